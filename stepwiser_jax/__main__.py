"""The command line: `stepwiser quickstart`, `<stage>`, `recipe`, `compare-judges`, `reproduce`,
`plan`, `convert`.

A mistake of the user's is one message and exit status 2; a traceback is a bug. After Ctrl-C and
SIGTERM a stage that samples or trains saves and exits with 130; the same command goes on from
there. Everything else ends at once.
"""

from __future__ import annotations

import importlib
import inspect
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from stepwiser_jax import __version__
from stepwiser_jax.errors import UserError

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stepwiser {__version__}")
        raise typer.Exit


_Version = typer.Option("--version", help="Print it.", callback=_print_version, is_eager=True)


@app.callback()
def _options(version: Annotated[bool, _Version] = False) -> None: ...


STAGES = {
    "sft": (
        "Fine-tune a policy on chunked solutions, or a judge on judgments (its cold start).",
        "Reads examples and a model. Writes checkpoints/, metrics.jsonl, model/.",
    ),
    "rollout": (
        "Sample chunked solutions of every problem and check their answers.",
        "Reads problems and a policy. Writes problems and trajectories. The embedded task "
        "(`problems.source: arithmetic`) has the splits rollout, dev and test.",
    ),
    "chunk-solutions": (
        "Cut right solutions into chunks, by a teacher's proposals or a rule, for sft.",
        "Reads a rollout run and a teacher. Writes chunked solutions.",
    ),
    "annotate": (
        "Estimate the value of every prefix of every trajectory by Monte Carlo rollouts.",
        "Reads a rollout run and a policy. Writes prefix values.",
    ),
    "label": (
        "Turn prefix values into chunk labels and balanced judge examples.",
        "Reads an annotate run and its rollout run. Writes chunk labels, judge examples and "
        "classifier examples.",
    ),
    "train-judge": (
        "Train a judge by GRPO to reason about a chunk before its verdict.",
        "Reads judge examples and a model. Writes checkpoints/, metrics.jsonl, model/.",
    ),
    "train-classifier": (
        "Train a discriminative process reward model: + or - after every chunk.",
        "Reads classifier examples and a model. Writes checkpoints/, metrics.jsonl, model/.",
    ),
    "rejection-sample": (
        "Sample judgments of labelled chunks and keep those that agree with the labels, for sft.",
        "Reads judge examples, or classifier examples, and a judge. Writes rationales, and SFT "
        "examples or dialogues.",
    ),
    "evaluate": (
        "Score a judge or a classifier on ProcessBench or PRMBench.",
        "Reads a benchmark (a file or hub id of either, or a rollout run) and a judge. Writes "
        "judgments.",
    ),
    "search": (
        "Chunk-reset, beam search, DVTS and best-of-N beside greedy decoding, sampling and votes.",
        "Reads problems, a policy and a judge. Writes search results.",
    ),
    "select-responses": (
        "Choose the best response to every problem by its chunks' mean score, for sft.",
        "Reads a rollout run and, if given, a judge. Writes selections.",
    ),
    "refine": (
        "Let a policy think again where a judge of GenPRM's form finds its first wrong step.",
        "Reads problems, a policy and a judge. Writes search results, one a turn.",
    ),
}


def _add_stage(name: str, does: str, files: str) -> None:
    @app.command(name, help=f"{does}\n\n{files}")
    def stage(
        config: Annotated[Path, typer.Option(help="YAML file in the schema of the stage.")],
        run_dir: Annotated[Path, typer.Option(help="Directory of the run; resumes if it exists.")],
        set_: Annotated[
            list[str], typer.Option("--set", help="Override a setting: a.b=value. Repeatable.")
        ] = [],  # noqa: B006 - typer copies it
        dry_run: Annotated[
            bool, typer.Option(help="Check config and input, print the config, write nothing.")
        ] = False,
        distributed: Annotated[
            bool, typer.Option("--distributed", help="Several processes: ask the cluster.")
        ] = False,
        coordinator: Annotated[
            str | None, typer.Option(help="HOST:PORT of process 0, where no cluster tells.")
        ] = None,
        num_processes: Annotated[int | None, typer.Option(help="With --coordinator.")] = None,
        process_id: Annotated[int | None, typer.Option(help="With --coordinator.")] = None,
        shard: Annotated[
            str | None,
            typer.Option(
                help="I/N: every N-th block of a sampling stage, from the I-th. Shards run at any "
                "time and place; the same command without --shard then finishes the run."
            ),
        ] = None,
    ) -> None:
        from stepwiser_jax.commands.results import print_summary
        from stepwiser_jax.config import dump_config, load_config
        from stepwiser_jax.distributed import hosts
        from stepwiser_jax.runs.storage import writing_to

        settings = load_config(name, config, tuple(set_), run_dir)
        if dry_run:
            from stepwiser_jax.commands.dry_run import check_inputs

            with writing_to(run_dir):
                check_inputs(name, settings, run_dir)
            typer.echo(dump_config(settings), nl=False)
            return
        module = importlib.import_module(f"stepwiser_jax.stages.{name.replace('-', '_')}")
        options: dict[str, Any] = {}
        if shard is not None:
            if "shard" not in inspect.signature(module.run).parameters:
                raise UserError(f"{name} does not sample: it cannot be cut into shards")
            options["shard"] = hosts.Shard.parse(shard)
        if distributed or (coordinator, num_processes, process_id) != (None, None, None):
            hosts.connect(coordinator, num_processes, process_id)
        with hosts.report_lost_peers(), writing_to(run_dir):
            summary = module.run(settings, run_dir, **options)
        print_summary(summary, run_dir)


for _name, (_does, _files) in STAGES.items():
    _add_stage(_name, _does, _files)


@app.command()
def quickstart(
    run_dir: Annotated[Path, typer.Option(help="Resumes if it exists.")] = Path("quickstart"),
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of data, sampling and initial weights.")
    ] = 0,
) -> None:
    """The whole method on the embedded arithmetic task with a tiny model, on this machine.

    Reads nothing. Writes one run directory per stage below --run-dir, and summary.json.
    """
    from stepwiser_jax.commands.quickstart import run_quickstart
    from stepwiser_jax.runs.storage import writing_to

    with writing_to(run_dir):
        run_quickstart(run_dir, seed)


@app.command("compare-judges")
def compare_judges(
    run_a: Annotated[Path, typer.Argument(help="A finished run of evaluate.")],
    run_b: Annotated[Path, typer.Argument(help="Another one on the same items.")],
    votes: Annotated[
        bool, typer.Option("--votes", help="Of evaluate runs with votes, what these say together.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="The same as JSON, in fractions.")] = False,
) -> None:
    """What the judge of RUN_B has over that of RUN_A on the same items, and how sure that is.

    Official F1 of both; the difference with its 95% interval and p by paired bootstrap; the items
    that one of them alone gets exactly right, with the p of McNemar's exact test. All of it is of
    the choice of items; what another seed of training would change it does not know. Of evaluate
    the greedy judgments count, or with --votes the majority (of GenPRM's form the mean) of the
    votes, of classify the run's threshold. Writes nothing.
    """
    from stepwiser_jax.commands.compare_judges import print_comparison

    print_comparison(run_a, run_b, votes=votes, as_json=json)


@app.command("reproduce")
def reproduce(
    run_dir: Annotated[Path, typer.Option(help="Resumes if it exists.")] = Path("reproduce"),
    seed: Annotated[
        list[int] | None,
        typer.Option(min=0, max=2**32 - 1, help="Once for each; 0, 1 and 2 without it."),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Instead, search the learning rates that are used.")
    ] = False,
) -> None:
    """The paper's claims on the embedded task: every judge, search and selection, several seeds.

    Reads nothing. Writes one run directory per stage and seed below --run-dir, compare.json and
    compare.md; with --tune tuning.json. Seeds may run side by side, each a command of its own; one
    command with all of them then makes the table.
    """
    from stepwiser_jax.commands.reproduce import measure, report
    from stepwiser_jax.runs.storage import writing_to

    with writing_to(run_dir):
        if tune:
            measure.tune(run_dir)
        else:
            report.reproduce(run_dir, seed or (0, 1, 2))


@app.command()
def convert(
    checkpoint: Annotated[
        Path,
        typer.Option(help="Run directory of a stage that trains, or one of its checkpoints/N."),
    ],
    output: Annotated[Path, typer.Option(help="A new directory.")],
) -> None:
    """Export a checkpoint as a Hugging Face directory that transformers loads.

    Reads checkpoints/ and template/ of a training run. Writes safetensors, config and tokenizer.
    """
    from stepwiser_jax.commands.convert import convert_checkpoint
    from stepwiser_jax.runs.storage import writing_to

    with writing_to(output):
        convert_checkpoint(checkpoint, output)


@app.command()
def recipe(
    prefix: Annotated[
        str, typer.Argument(help="What its configs begin with, such as configs/qwen2.5-1.5b.")
    ],
    runs: Annotated[Path, typer.Option(help="Directory of its runs.")] = Path("RUNS"),
    dry_run: Annotated[
        bool, typer.Option(help="Also check every stage as its own --dry-run does.")
    ] = False,
) -> None:
    """The stages of a recipe, as commands in the order in which they run. Runs none of them.

    PREFIX_NAME.yaml is the config of the run RUNS/NAME, for the stage that it names; RUNS/NAME in
    another one is this run. Exits with 2 where a config reads what no other writes. --dry-run
    checks models and data too, and of the runs between them those that are finished. Needs no
    accelerator.
    """
    from stepwiser_jax.commands.recipe import print_recipe

    print_recipe(prefix, runs, dry_run=dry_run)


@app.command()
def plan(
    stage: Annotated[
        str,
        typer.Argument(help="sft, rollout, annotate, train-judge, train-classifier or evaluate."),
    ],
    config: Annotated[Path, typer.Option(help="YAML file in the schema of the stage.")],
    topology: Annotated[str, typer.Option(help="Chips of a slice, such as v5p:4x4x4.")],
    slices: Annotated[int, typer.Option(help="How many slices.", min=1)] = 1,
    set_: Annotated[
        list[str], typer.Option("--set", help="Override a setting: a.b=value. Repeatable.")
    ] = [],  # noqa: B006 - typer copies it
    json: Annotated[bool, typer.Option("--json", help="Everything, in bytes and seconds.")] = False,
    search: Annotated[
        bool, typer.Option("--search", help="Also the largest batches that fit; takes longer.")
    ] = False,
) -> None:
    """Whether a run fits a TPU slice, and how fast it can be at best. Needs no TPU.

    Reads the config and config.json of its model. Writes nothing; exits 1 where it does not fit.
    Needs the extra `tpu`, for its compiler.
    """
    from stepwiser_jax.commands.plan.command import print_plan

    if not print_plan(stage, config, tuple(set_), topology, slices, as_json=json, searched=search):
        raise typer.Exit(1)


def refuse_old_names(arguments: list[str]) -> None:
    """Raises UserError for a command that has another name now."""
    from stepwiser_jax.config import RENAMED_COMMANDS

    if arguments and arguments[0] in RENAMED_COMMANDS:
        raise UserError(f"the command {arguments[0]} is now {RENAMED_COMMANDS[arguments[0]]}")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    from stepwiser_jax.runs.signals import Interrupted

    try:
        refuse_old_names(sys.argv[1:] if arguments is None else arguments)
        status = app(arguments, standalone_mode=False)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except typer.TyperException as error:
        if message := error.format_message():  # without arguments there is the help instead
            print(f"error: {message}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt, typer.Abort):
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return status if isinstance(status, int) else 0


def run() -> None:
    """The console script."""
    from stepwiser_jax.distributed.hosts import exit_process

    # Ctrl-C ends the process at once, as SIGTERM does, in the middle of compilation too: Python's
    # own handler would wait for it. What has something to save waits for the end of its work.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        status = main()
    except Exception:
        # Python's own exit would wait for the other processes.
        traceback.print_exc()
        status = 1
    exit_process(status)


if __name__ == "__main__":
    run()
