"""One file per pipeline step, each `run(config, run_dir) -> summary`. Stages meet on disk only."""
