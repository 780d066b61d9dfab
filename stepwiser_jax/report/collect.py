"""Reads runs into what a report shows: plain data, without a word of how it looks.

    run directories -> runs, solutions, comparisons of judges, sessions of search

A run that cannot be read in part is shown as far as it can, and `notices` say what is missing.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stepwiser_jax.config import Evaluate
from stepwiser_jax.config_files import validate
from stepwiser_jax.data.problems import read_items, read_problems
from stepwiser_jax.errors import UserError
from stepwiser_jax.evaluation.judgments import votes_of
from stepwiser_jax.evaluation.paired import (
    JudgedRun,
    check_same_items,
    compare_judged,
    judged_run,
)
from stepwiser_jax.judges.base import vote_suffixes
from stepwiser_jax.manifest import read_manifest
from stepwiser_jax.record_lines import to_json
from stepwiser_jax.records import (
    BenchmarkItem,
    ChunkedSolution,
    ChunkLabel,
    ClassifierExample,
    Judgment,
    PrefixValue,
    Problem,
    ProcessBenchItem,
    Rationale,
    SearchResult,
    Selection,
    Trajectory,
    natural_key,
)
from stepwiser_jax.report.figures import (
    LABELLED,
    Chart,
    Table,
    evaluate_tables,
    flat,
    histogram,
    means_by,
    search_figures,
    table_of,
    training_charts,
)
from stepwiser_jax.report.runs import Run, find_runs, read_run, seconds_of
from stepwiser_jax.report.solutions import Judged, ShownSolution, Solutions, Written
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.tasks.sources import TRUTH
from stepwiser_jax.text.chunks import CHUNK_CLOSE, chunk_texts

LATE = 12
"""From this chunk on, chunks are counted together."""

MAX_COMPARISONS = 10
"""Pairs of judges that are compared; each takes some seconds."""

TENTHS = [i / 10 for i in range(11)]
READS = ("model.path", "policy.path", "judge.path", "teacher.path", "examples.source", "rollouts",
         "values", "problems.source", "problems.split", "benchmark.source", "benchmark.split",
         "tokenizer", "rule", "reward", "seed")  # fmt: skip
"""Settings that say on what a run worked."""


@dataclass
class Contents:
    """What a report shows.

    Attributes:
        title: What the runs are called together.
        runs: What ran, with its charts and tables.
        tables: The numbers that matter, of all runs together.
        solutions: The solutions to browse.
        judges: The names of the judges, which `ShownSolution.judged` counts from 0.
        comparisons: Two judges on the same items each: `a` and `b`, the statistics of
            `evaluation.paired`, and `cells`, which says of each solution whether both judges are
            right (0), only a (1), only b (2), neither (3), or that it is not of these items (-1).
        sessions: Problems that a search solved, each with what its methods found.
        notices: What could not be read, or was left out.
    """

    title: str
    runs: list[dict[str, Any]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    solutions: list[ShownSolution] = field(default_factory=list)
    judges: list[str] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def collect(paths: Sequence[Path], limit: int) -> Contents:
    """Reads the runs at these paths.

    Args:
        paths: Run directories, or directories that hold some.
        limit: The most solutions of one run to show, and the most problems of one search. Numbers,
            charts and comparisons count all.

    Raises:
        UserError: There is no run at a path.
    """
    runs = find_runs(paths)
    report = Contents(", ".join(path.resolve().name for path in paths))
    collector = _Collector(report, limit)
    for run in runs:
        collector.trying(run, lambda run=run: report.runs.append(describe(run)))
    collector.add_rollouts(runs)
    for run in runs:
        for read in (collector.add_judged, collector.add_texts, collector.add_sessions):
            collector.trying(run, lambda run=run, read=read: read(run))
    report.solutions = list(collector.solutions)
    collector.compare()
    report.tables = [
        *itertools.chain(*map(claims_of, paths)),
        *tables_of_runs(report.runs),
        *itertools.chain(*map(label_quality_of, paths)),
    ]
    return report


# --- one run ------------------------------------------------------------------------------------


def describe(run: Run) -> dict[str, Any]:
    """Returns what ran, on what and how long, with its charts, tables and settings."""
    metrics, summary = run.metrics(), run.summary()
    counts = read_manifest(run.path)["records"] if run.is_finished else {}
    charts, tables = training_charts(metrics), []
    if run.stage == "evaluate":
        tables += evaluate_tables(summary)
    if run.stage in ("search", "refine"):
        tables, charts = search_figures(summary)
    if run.stage == "label":
        charts += label_charts(run)
    if run.stage == "annotate":
        charts += value_charts(run)
    if run.stage == "rollout":
        charts += rollout_charts(run)
    left_out = {"compiled", "warm_up", "judgments"}
    if tables:
        left_out |= {name for name, part in summary.items() if isinstance(part, dict)}
    return {
        "name": run.name,
        "path": str(run.path),
        "stage": run.stage,
        "is_finished": run.is_finished,
        "seconds": seconds_of(run, metrics),
        "reads": [[name, _text(value)] for name in READS if (value := run.setting(name))],
        "wrote": [[kind.replace("_", " "), part["count"]] for kind, part in counts.items()],
        "steps": metrics[-1]["step"] if metrics else None,
        "numbers": [
            [name.replace("_", " "), value]
            for name, value in flat({k: v for k, v in summary.items() if k not in left_out})
        ],
        "charts": charts,
        "tables": tables,
        "settings": yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True),
    }


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def label_charts(run: Run) -> list[Chart]:
    """Returns how labels follow from values: what a chunk adds, and where negative labels are."""
    labels = list(run.records(ChunkLabel))
    if not labels:
        return []
    gain: dict[str, list[float]] = {"positive": [], "negative": []}
    for label in labels:
        gain["positive" if label.is_positive else "negative"].append(label.q - label.v)
    shares = [(label.chunk_index, float(label.is_positive)) for label in labels]
    q = {"all chunks": [label.q for label in labels]}
    edges = [i / 5 for i in range(-5, 6)]
    return [
        histogram("What a chunk adds to the value", "value after - before", gain, edges),
        histogram("Values after a chunk", "value", q, TENTHS),
        means_by("Positive labels by position", "chunk (0-based)", "positive", shares, LATE),
    ]  # fmt: skip


def value_charts(run: Run) -> list[Chart]:
    """Returns how values are spread, and how they change along solutions."""
    values = list(run.records(PrefixValue))
    if not values:
        return []
    of_problem = [value.value for value in values if value.num_chunks == 0]
    of_prefix = [value.value for value in values if value.num_chunks > 0]
    spread = {"bare problems": of_problem, "prefixes": of_prefix}
    along = [(value.num_chunks, value.value) for value in values]
    return [
        histogram("Monte Carlo values", "value", spread, TENTHS),
        means_by("Mean value by the number of chunks", "chunks", "value", along, LATE),
    ]


def rollout_charts(run: Run) -> list[Chart]:
    """Returns how long solutions are, right ones and wrong ones."""
    chunks: dict[str, list[float]] = {"right answer": [], "wrong answer": []}
    tokens: dict[str, list[float]] = {"right answer": [], "wrong answer": []}
    for trajectory in run.records(Trajectory):
        kind = "right answer" if trajectory.is_correct else "wrong answer"
        chunks[kind].append(min(len(trajectory.chunk_ends), LATE))
        tokens[kind].append(trajectory.tokens.num_completion)
    longest = max((n for found in tokens.values() for n in found), default=0)
    if not longest:
        return []
    edges = sorted({round(longest * i / 10) for i in range(11)})
    return [
        histogram(f"Chunks of a solution, up to {LATE}", "chunks", chunks, range(LATE + 2)),
        histogram("Tokens of a solution", "tokens", tokens, edges),
    ]  # fmt: skip


# --- all runs -----------------------------------------------------------------------------------


def tables_of_runs(runs: Sequence[dict[str, Any]]) -> list[Table]:
    """Returns the scores of all judges in one table, and the tables of searches."""
    found = []
    for stage, title in (("evaluate", "Judges"), ("search", "Search"), ("refine", "Refinement")):
        of_stage = [run for run in runs if run["stage"] == stage and run["tables"]]
        by_columns: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for run in of_stage:
            by_columns[str(run["tables"][0]["columns"])].append(run)
        for alike in by_columns.values():
            rows = [[run["name"], *row] for run in alike for row in run["tables"][0]["rows"]]
            if stage == "evaluate":  # the run's own table has the thresholds too
                rows = [row for row in rows if "_at_half" not in row[1]]
            columns = [["run", "text"], *alike[0]["tables"][0]["columns"]]
            if len(alike) == 1:
                rows, columns = [row[1:] for row in rows], columns[1:]
            found.append(alike[0]["tables"][0] | {"title": title, "columns": columns, "rows": rows})
    return found


def label_quality_of(path: Path) -> list[Table]:
    """Returns how good labels are, as quickstart has written it about its runs."""
    labels = _read_mapping(path / "summary.json").get("labels")
    if not isinstance(labels, dict) or (path / "config.yaml").is_file():
        return []
    note = "Rules for labels against the exact truth of the embedded task."
    rows = {str(rule): row for rule, row in labels.items() if isinstance(row, dict)}
    return [table_of("Labels", rows, LABELLED, note)]


def claims_of(path: Path) -> list[Table]:
    """Returns what reproduce has decided about the paper's claims, by the seeds beside this one."""
    claims = _read_mapping(path / "compare.json") or _read_mapping(path.parent / "compare.json")
    claims = claims.get("claims")
    if not isinstance(claims, list):
        return []
    names = ("task", "claim", "difference", "corrected_p", "verdict")
    formats = ("text", "text", "points", "p", "text")
    columns = [[x.replace("_", " "), form] for x, form in zip(names, formats, strict=True)]
    found = [claim | {"difference": [claim["difference"], *claim["interval"]]} for claim in claims]
    rows = [[claim[name] for name in names] for claim in found]
    note = "Means over seeds, in points; p is corrected for the number of claims."
    return [{"title": "Claims", "columns": columns, "rows": rows, "note": note}]


def _read_mapping(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text()) if file.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


# --- solutions, judges, sessions ----------------------------------------------------------------


@dataclass
class _Rollouts:
    """What is known of the trajectories of a run of `rollout`, by their ids."""

    run: Run
    values: dict[str, dict[int, list[int]]] = field(default_factory=lambda: defaultdict(dict))
    labels: dict[str, dict[int, ChunkLabel]] = field(default_factory=lambda: defaultdict(dict))


class _Collector:
    def __init__(self, report: Contents, limit: int):
        self.report, self.limit = report, limit
        self.solutions = Solutions()
        self._problems: dict[str, Problem] = {}
        self._judged: list[tuple[int, JudgedRun, list[ShownSolution]]] = []

    def trying(self, run: Run, read: Callable[[], None]) -> None:
        """Reads a part of a run. What cannot be read becomes a notice."""
        try:
            read()
        except (UserError, OSError) as error:
            self.report.notices.append(f"{run.name}: {error}")

    def shown(self, run: Run, found: Sequence[Any], what: str) -> Sequence[Any]:
        """Returns as many as are shown, and says so if some are left out."""
        if len(found) > self.limit:
            self.report.notices.append(
                f"{run.name}: the browser shows {self.limit} of {len(found)} {what} (`--limit` "
                "shows more); numbers and charts count all"
            )
        return found[: self.limit]

    # trajectories, with their values and labels

    def add_rollouts(self, runs: Sequence[Run]) -> None:
        """Adds the solutions of runs of `rollout`, of those whose values or labels are there also
        if the run itself was not named."""
        sources: dict[Path, _Rollouts] = {}

        def source(path: Path, name: str) -> _Rollouts:
            key = path.resolve()
            if key not in sources:
                known = next((run for run in runs if run.path.resolve() == key), None)
                sources[key] = _Rollouts(known or read_run(path, name))
            return sources[key]

        def add_values(run: Run, rollouts: Path) -> None:
            found = source(rollouts, rollouts.name).values
            for value in run.records(PrefixValue):
                found[value.trajectory_id][value.num_chunks] = list(value.counts)

        def add_labels(run: Run) -> None:
            rollouts, values = (run.located(run.settings[n]) for n in ("rollouts", "values"))
            found = source(rollouts, rollouts.name).labels
            for label in run.records(ChunkLabel):
                found[label.trajectory_id][label.chunk_index] = label
            if values.is_dir() and not any(r.path.resolve() == values.resolve() for r in runs):
                add_values(read_run(values, values.name), rollouts)

        for run in runs:
            if run.stage == "rollout":
                source(run.path, run.name)
            elif run.stage == "annotate":
                self.trying(
                    run, lambda run=run: add_values(run, run.located(run.settings["rollouts"]))
                )
            elif run.stage == "label":
                self.trying(run, lambda run=run: add_labels(run))
        for found in sources.values():
            self.trying(found.run, lambda found=found: self._add_trajectories(found))

    def _add_trajectories(self, source: _Rollouts) -> None:
        run = source.run
        self._problems |= {problem.problem_id: problem for problem in run.records(Problem)}
        tokenizer = load_tokenizer_of(str(run.located(run.settings["policy"]["path"])))
        found = sorted(
            run.records(Trajectory),
            key=lambda t: t.trajectory_id not in source.values | source.labels,
        )
        for trajectory in self.shown(run, found, "solutions"):
            problem = self._problems.get(trajectory.problem_id)
            texts = chunk_texts(tokenizer, trajectory.completion_ids, trajectory.chunk_ends)
            values = source.values.get(trajectory.trajectory_id)
            labels = source.labels.get(trajectory.trajectory_id)
            solution = ShownSolution(
                trajectory.trajectory_id,
                run.name,
                problem.source if problem else "",
                problem.question if problem else "",
                texts,
                answer=problem.answer if problem else "",
                is_correct=trajectory.is_correct,
                is_cut=trajectory.is_cut,
                tokens=trajectory.tokens.num_completion,
            )
            if values is not None:
                solution.values = [values.get(j) for j in range(len(texts) + 1)]
            if labels is not None:
                solution.labels = [
                    labels[j].is_positive if j in labels else None for j in range(len(texts))
                ]
            if (
                problem is not None
                and problem.source in TRUTH
                and run.setting("chunking") in (None, "tags")
            ):
                item = TRUTH[problem.source](problem, solution.id, texts, trajectory.is_correct)
                solution.truth, solution.first_error = truth_of(item), item.first_error
            self.solutions.add(solution)

    # judges

    def add_judged(self, run: Run) -> None:
        """Adds what a run of `evaluate` says of the items of its benchmark."""
        if run.stage != "evaluate":
            return
        config = validate(Evaluate, run.settings, str(run.path / "config.yaml"))
        benchmark = {"source": str(run.located(config.benchmark.source))}
        judge = {"path": str(run.located(config.judge.path))}
        config = config.model_copy(
            update={
                "benchmark": config.benchmark.model_copy(update=benchmark),
                "judge": config.judge.model_copy(update=judge),
            }
        )
        judgments = {judgment.example_id: judgment for judgment in run.records(Judgment)}
        items = [item for item in read_items(config) if f"{item.item_id}/0" in judgments]
        number = len(self.report.judges)
        self.report.judges.append(run.name)
        whole = [item for item in items if isinstance(item, ProcessBenchItem)]
        judged = None
        if run.is_finished and len(whole) == len(items) > 0:
            judged = judged_run(run.path, config, whole, judgments, votes=False)
        origin = run.located(config.benchmark.source).name
        suffixes = ["", *vote_suffixes(votes_of(config.judge))]
        shown = []
        for i, item in enumerate(self.shown(run, items, "items")):
            solution = self.solutions.add(_solution_of(item, origin))
            solution.judged[number] = _judged(item, judgments, suffixes)
            if judged is not None:
                solution.judged[number].predicted = judged.predictions[i]
            shown.append(solution)
        if judged is not None:
            self._judged.append((number, judged, shown))
        if items and self.report.runs:
            charts = judge_charts(items, judgments)
            next(r for r in self.report.runs if r["path"] == str(run.path))["charts"] += charts

    def compare(self) -> None:
        """Compares each pair of judges that have judged the same items, the first ones if there are
        many."""
        position = {id(solution): i for i, solution in enumerate(self.report.solutions)}
        pairs = itertools.combinations(self._judged, 2)
        for (a, run_a, shown), (b, run_b, _) in pairs:
            try:
                check_same_items(run_a, run_b)
            except UserError:
                continue
            if len(self.report.comparisons) == MAX_COMPARISONS:
                self.report.notices.append(
                    f"the first {MAX_COMPARISONS} pairs of judges are compared: name two runs for "
                    "another pair"
                )
                return
            cells = [-1] * len(position)
            outcomes = zip(run_a.items, run_a.predictions, run_b.predictions, strict=True)
            for solution, (item, of_a, of_b) in zip(shown, outcomes, strict=False):
                wrong_a, wrong_b = of_a != item.first_error, of_b != item.first_error
                cells[position[id(solution)]] = 2 * wrong_a + wrong_b
            counts = {"counted_a": run_a.counted, "counted_b": run_b.counted}
            found = counts | compare_judged(run_a, run_b)
            self.report.comparisons.append({"a": a, "b": b, "statistics": found, "cells": cells})

    # other records that hold solutions

    def add_texts(self, run: Run) -> None:
        """Adds solutions that were cut into chunks, labelled, selected, or judged to learn from."""
        found: Iterable[ShownSolution] = ()
        if run.stage == "chunk-solutions":
            found = (
                ShownSolution(s.trajectory_id, run.name, "", s.question, list(s.chunks))
                for s in run.records(ChunkedSolution)
                if s.chunks
            )
        elif run.stage == "select-responses":
            found = (_selected(run, s) for s in run.records(Selection))
        elif run.stage == "label" and not any(s.labels for s in self.solutions):
            labels = {(x.trajectory_id, x.chunk_index): x for x in run.records(ChunkLabel)}
            found = (_labelled(run, s, labels) for s in run.records(ClassifierExample))
        elif run.stage == "rejection-sample" and run.holds(Rationale):
            number = len(self.report.judges)
            self.report.judges.append(run.name)
            found = (_rationale(run, r, number) for r in run.records(Rationale))
        for solution in self.shown(run, list(found), "solutions"):
            self.solutions.add(solution)

    # search

    def add_sessions(self, run: Run) -> None:
        """Adds the problems of a search, each with what its methods found."""
        if not run.holds(SearchResult):
            return
        of_problem: dict[str, list[SearchResult]] = defaultdict(list)
        for result in run.records(SearchResult):
            of_problem[result.problem_id].append(result)
        ids = sorted(of_problem, key=natural_key)
        problems = dict(self._problems)
        if not set(ids) <= set(problems):
            problems |= {p.problem_id: p for p in _problems_of(run)}
        for problem_id in self.shown(run, ids, "problems"):
            problem = problems.get(problem_id)
            self.report.sessions.append(
                {
                    "id": problem_id,
                    "run": run.name,
                    "question": problem.question if problem else "",
                    "answer": problem.answer if problem else "",
                    "results": [_result(result) for result in of_problem[problem_id]],
                }
            )


def _problems_of(run: Run) -> list[Problem]:
    """Returns the problems that a run solved, none if they cannot be read now."""
    from stepwiser_jax.config import DataSource

    try:
        return read_problems(validate(DataSource, run.settings["problems"], ""))
    except (UserError, OSError):
        return []


def _result(result: SearchResult) -> dict[str, Any]:
    found = json.loads(to_json(result))
    return {name: value for name, value in found.items() if name not in ("search_id", "problem_id")}


def _solution_of(item: BenchmarkItem, origin: str) -> ShownSolution:
    return ShownSolution(
        item.item_id,
        origin,
        item.subset,
        item.question,
        list(item.steps),
        truth=truth_of(item),
        first_error=item.first_error,
        is_correct=item.final_answer_correct if isinstance(item, ProcessBenchItem) else None,
    )


def truth_of(item: BenchmarkItem) -> list[bool | None]:
    """Returns whether each step is right. Of steps after the first error ProcessBench says nothing,
    PRMBench does."""
    is_cumulative = isinstance(item, ProcessBenchItem)
    end = item.first_error if is_cumulative and item.first_error >= 0 else len(item.steps)
    return [item.is_right(step) if step <= end else None for step in range(len(item.steps))]


def _judged(item: BenchmarkItem, judgments: dict[str, Judgment], suffixes: Sequence[str]) -> Judged:
    def of(part: int | str) -> list[Written]:
        ids = [f"{item.item_id}/{part}{suffix}" for suffix in suffixes]
        found = [judgments[i] for i in ids if i in judgments]
        return [(j.verdict.value, j.p_positive, j.completion) for j in found]

    return Judged([of(step) for step in range(len(item.steps))], of("solution"))


def judge_charts(items: Sequence[BenchmarkItem], judgments: dict[str, Judgment]) -> list[Chart]:
    """Returns how P(Positive) tells right steps from wrong ones, and how often the verdict is right
    by position. Steps after the first error are left out: the benchmark says nothing of them."""
    p_positive: dict[str, list[float]] = {"right steps": [], "first errors": []}
    right: list[tuple[int, float]] = []
    for item, step, judgment in _judged_steps(items, judgments):
        is_right = item.is_right(step)
        p_positive["right steps" if is_right else "first errors"].append(judgment.p_positive)
        right.append((step, float((judgment.verdict.value == "Positive") == is_right)))
    title = "Verdicts that agree with the truth, by position"
    return [
        histogram("P(Positive) of right and wrong steps", "P(Positive)", p_positive, TENTHS),
        means_by(title, "step (0-based)", "agree", right, LATE),
    ]  # fmt: skip


def _judged_steps(
    items: Sequence[BenchmarkItem], judgments: dict[str, Judgment]
) -> Iterator[tuple[BenchmarkItem, int, Judgment]]:
    for item in items:
        end = len(item.steps) if item.first_error == -1 else item.first_error + 1
        for step in range(end):
            if judgment := judgments.get(f"{item.item_id}/{step}"):
                yield item, step, judgment


def _labelled(
    run: Run, example: ClassifierExample, labels: dict[tuple[str, int], ChunkLabel]
) -> ShownSolution:
    """Returns a labelled solution whose trajectory is not there, such as one of somebody's data."""
    chunks = len(example.chunks)
    found = dict(zip(example.labelled, example.is_positive, strict=True))
    values: list[list[float] | None] = [None] * (chunks + 1)
    for j in range(chunks):
        if label := labels.get((example.solution_id, j)):
            values[j], values[j + 1] = [label.v, 1.0], [label.q, 1.0]
    return ShownSolution(
        example.solution_id,
        run.name,
        "",
        example.question,
        list(example.chunks),
        values=values if any(values) else None,
        labels=[found.get(j) for j in range(chunks)],
    )


def _selected(run: Run, selection: Selection) -> ShownSolution:
    texts = re.split(f"(?<={CHUNK_CLOSE})", selection.completion)
    return ShownSolution(
        selection.trajectory_id,
        run.name,
        "",
        selection.question,
        [text for text in texts if text.strip()] or [selection.completion],
        is_correct=selection.is_correct,
    )


def _rationale(run: Run, rationale: Rationale, judge: int) -> ShownSolution:
    """Returns a judgment to learn from as a solution of one chunk, the prompt. In place of a
    verdict it has what became of it."""
    written = (rationale.outcome, float(rationale.is_positive), rationale.completion)
    return ShownSolution(
        rationale.rationale_id,
        run.name,
        rationale.outcome,
        "",
        [rationale.prompt],
        labels=[rationale.is_positive],
        judged={judge: Judged([[written]])},
    )
