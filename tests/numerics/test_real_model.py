"""A pretrained checkpoint against transformers, greedy decoding, token for token.

pytest tests/numerics/test_real_model.py --model DIR_OR_HUB_ID --problems test.jsonl
"""

import jax
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from sampled import Reference

from stepwiser_jax.data.datasets import load_problems
from stepwiser_jax.inference.params import SamplingParams
from stepwiser_jax.model.hf import load_hf
from stepwiser_jax.text.prompts import encode_solve_prompt
from stepwiser_jax.text.tokenizer import load_tokenizer

NEW_TOKENS = 64


def test_greedy_continuations_are_those_of_transformers(request):
    path, source = (request.config.getoption(name) for name in ("--model", "--problems"))
    if path is None or source is None:
        pytest.skip("needs --model and --problems")
    tokenizer = load_tokenizer(path)
    problems = load_problems(source, limit=8)
    prompts = [encode_solve_prompt(tokenizer, p.question, "instruct") for p in problems]
    assert len(prompts) == 8

    longest = max(map(len, prompts)) + NEW_TOKENS
    sampler = Reference(load_hf(path), tokenizer, rows=[8], buckets=[longest])
    params = SamplingParams(NEW_TOKENS, temperature=0.0, stop_ids=tokenizer.eos_ids)
    row_ids = [problem.problem_id for problem in problems]
    output = sampler.generate(prompts, params, key=jax.random.key(0), row_ids=row_ids)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for b, prompt in enumerate(prompts):
        whole = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True
        )
        found = output[b].tokens.tolist()
        assert found == whole[0, len(prompt) :].tolist(), tokenizer.decode(found)
