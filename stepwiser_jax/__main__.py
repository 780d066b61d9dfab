"""The command line: `stepwiser quickstart`, `check`, `serve`, `<stage>`, `recipe`,
`compare-judges`, `report`, `status`, `reproduce`, `plan`, `convert`.

A user's mistake gives one message and exit status 2; a traceback is a bug. On Ctrl-C or SIGTERM a
stage that samples or trains saves its work and exits with 130, and the same command resumes it.
`serve` answers what it has accepted. Everything else ends at once.
"""

from __future__ import annotations

import inspect
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from stepwiser_jax import __version__
from stepwiser_jax.errors import UserError
from stepwiser_jax.runs.signals import Interrupted
from stepwiser_jax.runs.storage import writing_to

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stepwiser {__version__}")
        raise typer.Exit


_Version = typer.Option("--version", help="Print it.", callback=_print_version, is_eager=True)

ConfigFile = Annotated[Path, typer.Option(help="YAML file in the schema of the stage.")]
Overrides = Annotated[
    list[str], typer.Option("--set", help="Override a setting: a.b=value. Repeatable.")
]
WeightType = Literal["float32", "bfloat16", "float16"]
NoReport = Annotated[bool, typer.Option("--no-report", help="Do not write report.html at the end.")]
ResumedDir = Annotated[Path, typer.Option(help="Resumes if it exists.")]


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
        "Compare chunk-reset, beam search, DVTS and best-of-N with greedy decoding and votes.",
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
        config: ConfigFile,
        run_dir: Annotated[Path, typer.Option(help="Directory of the run; resumes if it exists.")],
        set_: Overrides = [],  # noqa: B006 - typer copies it
        dry_run: Annotated[
            bool, typer.Option(help="Check config and input, print the config, write nothing.")
        ] = False,
        distributed: Annotated[
            bool, typer.Option("--distributed", help="Run as several processes; ask the cluster.")
        ] = False,
        coordinator: Annotated[
            str | None, typer.Option(help="HOST:PORT of process 0, if no cluster tells.")
        ] = None,
        num_processes: Annotated[int | None, typer.Option(help="With --coordinator.")] = None,
        process_id: Annotated[int | None, typer.Option(help="With --coordinator.")] = None,
        shard: Annotated[
            str | None,
            typer.Option(
                help="I/N: do every N-th block of a sampling stage, from the I-th. Shards run at "
                "any time and place; the same command without --shard then finishes the run."
            ),
        ] = None,
        no_report: NoReport = False,
    ) -> None:
        from stepwiser_jax.commands.report import end_stage_with_report
        from stepwiser_jax.commands.results import print_summary
        from stepwiser_jax.config_files import dump_config, load_config
        from stepwiser_jax.distributed import hosts
        from stepwiser_jax.stages import stage_module

        settings = load_config(name, config, tuple(set_), run_dir)
        if dry_run:
            from stepwiser_jax.commands.dry_run import check_inputs

            with writing_to(run_dir):
                check_inputs(name, settings, run_dir)
            typer.echo(dump_config(settings), nl=False)
            return
        module = stage_module(name)
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
        if not no_report and hosts.is_primary():
            end_stage_with_report(run_dir)


for _name, (_does, _files) in STAGES.items():
    _add_stage(_name, _does, _files)


@app.command()
def quickstart(
    run_dir: ResumedDir = Path("quickstart"),
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of data, sampling and weights.")
    ] = 0,
    no_report: NoReport = False,
) -> None:
    """Run the whole method on the embedded arithmetic task with a tiny model, on this machine.

    Reads nothing. Writes one run directory per stage below --run-dir, summary.json and report.html.
    """
    from stepwiser_jax.commands.quickstart import run_quickstart
    from stepwiser_jax.commands.report import end_with_report

    with writing_to(run_dir):
        run_quickstart(run_dir, seed)
    if not no_report:
        end_with_report([run_dir])


@app.command()
def report(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_DIR",
            help="Runs, finished or not, or directories that hold some.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The file to write. By default report.html in RUN_DIR, or beside several."
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="The most solutions of one run to show; numbers count all.")
    ] = 5000,
) -> None:
    """Write one HTML file of what runs hold: numbers, curves, solutions with their judgments.

    It opens from disk and needs no network. Runs of any stage are shown; two runs of evaluate on
    the same items are compared, disagreements first. Changes nothing in the runs.
    """
    from stepwiser_jax.commands.report import write_report

    typer.echo(write_report(run_dirs, output, limit))


@app.command()
def check(
    run: Annotated[
        Path | None,
        typer.Argument(
            help="A finished run that trained a judge or used one, or an exported judge; by "
            "default the judge of the package.",
        ),
    ] = None,
    problem: Annotated[str | None, typer.Option(help="The problem.")] = None,
    step: Annotated[
        list[str], typer.Option(help="A step of its solution. Repeatable, in order.")
    ] = [],  # noqa: B006 - typer copies it
    file: Annotated[
        Path | None,
        typer.Option(
            help="A text (the problem, a blank line, the solution), or JSON rows with `problem` "
            "and `steps` or `solution`; - is stdin. With --problem, the solution alone."
        ),
    ] = None,
    cut: Annotated[
        str | None,
        typer.Option(
            help="What cuts a solution: tags, blank_lines, or a finished run of chunk-solutions. "
            "By default its <chunk> tags, else blank lines."
        ),
    ] = None,
    set_: Annotated[
        list[str],
        typer.Option("--set", help="Override a setting of the judge: judge.a.b=value. Repeatable."),
    ] = [],  # noqa: B006
    json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object a line for each solution.")
    ] = False,
) -> None:
    """Judge a solution of your own, chunk by chunk, and mark its first error.

    Without RUN the judge of the package shows an example. On a terminal, problems may then be
    typed. Writes nothing.
    """
    from stepwiser_jax.commands.check import Given, check_solutions

    given = Given(problem, step, file)
    check_solutions(run, given, cut_by=cut, overrides=set_, as_json=json)


@app.command()
def serve(
    run: Annotated[
        Path | None,
        typer.Argument(help="The judge, as `check` takes it; by default that of the package."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default only this machine is served.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    waiting: Annotated[
        int, typer.Option(min=1, help="The most requests that wait; further ones get 429.")
    ] = 256,
    timeout: Annotated[
        float, typer.Option(min=1, help="The most seconds of a request; then it gets 504.")
    ] = 300.0,
    set_: Annotated[
        list[str],
        typer.Option("--set", help="Override a setting of the judge: judge.a.b=value. Repeatable."),
    ] = [],  # noqa: B006
) -> None:
    """Serve a judge over HTTP: a page to paste solutions into, /check, /v1/completions.

    Requests that wait are judged together. STEPWISER_API_KEY, if it is set, is the key that clients
    must send. On Ctrl-C or SIGTERM it answers what it has accepted, and ends with 0.
    """
    from stepwiser_jax.commands.serve import serve_judge

    serve_judge(run, host=host, port=port, waiting=waiting, timeout=timeout, overrides=set_)


@app.command("compare-judges")
def compare_judges(
    run_a: Annotated[Path, typer.Argument(help="A finished run of evaluate.")],
    run_b: Annotated[Path, typer.Argument(help="Another finished run, on the same items.")],
    votes: Annotated[
        bool, typer.Option("--votes", help="Compare majority votes, not greedy judgments.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, with fractions.")] = False,
    no_report: NoReport = False,
) -> None:
    """Compare the judges of two runs on the same items.

    Prints the official F1 of both judges, and their difference with its 95% interval and its p by
    paired bootstrap. Counts the items that only one judge gets exactly right, with the p of
    McNemar's exact test. Intervals and p cover the choice of items, not the seed of training.
    Greedy judgments are compared, or with --votes the majority of the votes (GenPRM: their mean). A
    classifier uses the threshold of its run. Writes a report beside the runs, where every item can
    be looked at; none with --json.
    """
    from stepwiser_jax.commands.compare_judges import print_comparison
    from stepwiser_jax.commands.report import end_with_report

    print_comparison(run_a, run_b, votes=votes, as_json=json)
    if not json and not no_report:
        end_with_report([run_a, run_b])


@app.command()
def status(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_DIR", help="Runs, or directories that hold some."),
    ],
    watch: Annotated[
        float | None, typer.Option(min=0.2, help="Print again after so many seconds.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
) -> None:
    """Say of runs whether they are running, stopped or finished, how far they are, and how well.

    Reads what the runs have written, and changes nothing. Of a stopped run it prints the command
    that goes on with it.
    """
    from stepwiser_jax.commands.status import print_status

    print_status(run_dirs, watch=watch, as_json=json)


@app.command()
def doctor(
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Connect to the other processes of a cluster.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
) -> None:
    """Say what this machine has: versions, devices, memory, mesh, disk, hub; and what is missing.

    It compiles a small program, adds over all devices, and writes nothing that stays. Exits with 1
    if something is broken. With --distributed every process prints its own findings.
    """
    from stepwiser_jax.commands.doctor import run_doctor

    if distributed:
        from stepwiser_jax.distributed import hosts

        hosts.connect(None, None, None)
    status = run_doctor(typer.echo, as_json=json)
    if status:
        raise typer.Exit(status)


@app.command("reproduce")
def reproduce(
    run_dir: ResumedDir = Path("reproduce"),
    seed: Annotated[
        list[int] | None,
        typer.Option(min=0, max=2**32 - 1, help="Repeatable; 0 to 4 by default."),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Search for learning rates instead.")
    ] = False,
    join: Annotated[
        bool, typer.Option("--join", help="Make the table of finished seeds, and run nothing.")
    ] = False,
    no_report: NoReport = False,
) -> None:
    """Test the paper's claims on the embedded tasks, with several seeds.

    Runs every judge, search and selection. Reads nothing. Writes one run directory per stage and
    seed below --run-dir, seed-N/results.json, and compare.json and compare.md of every seed there;
    in each seed's directory a report.html of its runs. With --tune it writes tuning.json. Seeds may
    run side by side, or on several machines, each as one command: --join then makes the table of
    the results.json that are brought together.
    """
    from stepwiser_jax.commands.report import end_with_report
    from stepwiser_jax.commands.reproduce import measure, report

    with writing_to(run_dir):
        if tune:
            measure.tune(run_dir)
        elif join:
            report.join(run_dir)
        else:
            report.reproduce(run_dir, seed or range(5))
    if not tune and not no_report:
        for of_seed in sorted(run_dir.glob("seed-*")):
            if any(of_seed.glob("*/config.yaml")):
                end_with_report([of_seed])


@app.command()
def convert(
    checkpoint: Annotated[
        Path,
        typer.Option(help="Run directory of a stage that trains, or one of its checkpoints/N."),
    ],
    output: Annotated[Path, typer.Option(help="Directory to create.")],
    dtype: Annotated[
        WeightType | None,
        typer.Option(help="Type to store the weights in; by default the one that they have."),
    ] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(help="A run of evaluate on the model, for the model card. May be repeated."),
    ] = None,
    adapters: Annotated[
        bool, typer.Option("--adapters", help="Write the adapters of a LoRA run alone, as peft.")
    ] = False,
) -> None:
    """Export a checkpoint as a Hugging Face directory that transformers and vLLM load.

    Reads checkpoints/ and template/ of a training run. Writes safetensors, config and tokenizer, a
    model card (README.md), and for a judge how it is asked, which `check` reads.
    """
    from stepwiser_jax.commands.convert import convert_checkpoint

    with writing_to(output):
        convert_checkpoint(checkpoint, output, dtype, scores or (), adapters=adapters)


@app.command("export-dataset")
def export_dataset(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="Finished runs.")],
    output: Annotated[Path, typer.Option(help="Directory to create.")],
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Keep token ids and log-probs of trajectories.")
    ] = False,
) -> None:
    """Write the records of runs as parquet with a dataset card, for `datasets.load_dataset`."""
    from stepwiser_jax.commands import export_dataset as command

    with writing_to(output):
        parts = command.export_dataset(run_dirs, output, tokens=tokens)
    typer.echo(f"{output}: {', '.join(parts)}")


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
    """Print the commands of a recipe in the order in which they run. Runs none of them.

    PREFIX_NAME.yaml is the config of the run RUNS/NAME, and names its stage. Another config of the
    recipe reads this run by the name RUNS/NAME. Exits with 2 if a config reads what no other
    writes. --dry-run also checks models, data and those input runs that are finished. Needs no
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
    config: ConfigFile,
    topology: Annotated[str, typer.Option(help="Chips of a slice, such as v5p:4x4x4.")],
    slices: Annotated[int, typer.Option(help="Number of slices.", min=1)] = 1,
    set_: Overrides = [],  # noqa: B006 - typer copies it
    json: Annotated[
        bool, typer.Option("--json", help="Print all of it as JSON, in bytes and seconds.")
    ] = False,
    search: Annotated[
        bool, typer.Option("--search", help="Also find the largest batches that fit (slow).")
    ] = False,
) -> None:
    """Say whether a run fits a TPU slice, and how fast it can be at best. Needs no TPU.

    Reads the config and the config.json of its model. Writes nothing. Exits with 1 if the run does
    not fit. Needs the extra `tpu`, which holds the compiler.
    """
    from stepwiser_jax.commands.plan.command import print_plan

    if not print_plan(stage, config, tuple(set_), topology, slices, as_json=json, searched=search):
        raise typer.Exit(1)


def refuse_old_names(arguments: list[str]) -> None:
    """Raises UserError if a command has been renamed."""
    from stepwiser_jax.config_files import RENAMED_COMMANDS

    if arguments and arguments[0] in RENAMED_COMMANDS:
        raise UserError(f"the command {arguments[0]} is now {RENAMED_COMMANDS[arguments[0]]}")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    try:
        refuse_old_names(sys.argv[1:] if arguments is None else arguments)
        status = app(arguments, standalone_mode=False)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except typer.TyperException as error:
        if message := error.format_message():  # empty if the help was printed
            print(f"error: {message}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt, typer.Abort):
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return status if isinstance(status, int) else 0


def run() -> None:
    """Runs the command of this process, then ends the process."""
    from stepwiser_jax.distributed.hosts import exit_process

    # Ctrl-C ends the process at once, as SIGTERM does: Python's own handler would wait for a
    # compilation. Stages that have something to save install other handlers.
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
