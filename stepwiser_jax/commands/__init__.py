"""Commands that are not stages: the quickstart, the dry run, the export and others."""
