"""GenPRM (arXiv 2504.00891): a judge that talks about a solution step by step, and runs code."""
