"""What is no stage: the quickstart, the dry run, the export."""
