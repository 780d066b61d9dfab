"""`stepwiser check`: reads a solution of the user's own, has it judged, and prints the verdicts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from stepwiser_jax.config import ChunkSolutions
from stepwiser_jax.config_files import read_run_settings, validate
from stepwiser_jax.data.unlabelled import Unlabelled, solutions_of_file, solutions_of_text
from stepwiser_jax.errors import UserError
from stepwiser_jax.files import nothing_at
from stepwiser_jax.judges.base import ChunkJudgment, Solution
from stepwiser_jax.judges.check import PACKAGED, CheckedSolution, Checker
from stepwiser_jax.manifest import read_manifest
from stepwiser_jax.records import Verdict
from stepwiser_jax.runs.blocks import Session
from stepwiser_jax.runs.progress import printable
from stepwiser_jax.stages.chunk_solutions import make_proposer, most_agreed
from stepwiser_jax.text.chunking import cut, cut_at_tags, split_solution
from stepwiser_jax.text.tokenizer import known_words

EXAMPLE = Unlabelled(
    "example",
    "start 5 ; * 3 - 7 ; * 6 - 2 ; * 2 - 5 ?",
    ("5 * 3 = 5 ; 5 - 7 = 8", "8 * 6 = 8 ; 8 - 2 = 1", "1 * 2 = 2 ; 2 - 5 = 7", "\\boxed{ 7 }"),
)
"""What the judge of the package is shown if nothing else is given. Arithmetic is modulo 10."""

BLOCK = 64
"""Solutions that are judged together, before their verdicts are printed."""

MAX_LISTED = 100
"""The words that a tokenizer knows are listed if they are no more than these."""

MARKS = {Verdict.POSITIVE: ("✓", "green"), Verdict.NEGATIVE: ("✗", "red")}

Cutter = Callable[[Sequence[tuple[str, str]]], list[tuple[str, ...]]]
"""Cuts solutions, each with its id, into chunks."""


@dataclass(frozen=True)
class Given:
    """What was given on the command line: a problem and its steps, a file (`-` is stdin), or a
    problem whose solution is in the file."""

    problem: str | None
    steps: Sequence[str]
    file: Path | None

    @property
    def is_nothing(self) -> bool:
        return self.problem is None and not self.steps and self.file is None

    def solutions(self) -> list[Unlabelled]:
        """Returns the solutions to check. Raises UserError if a part is missing or there twice."""
        if self.steps and self.file is not None:
            raise UserError("expected the solution from --step or from --file, found both")
        if self.steps and self.problem is None:
            raise UserError("expected the problem of these steps, found none: add --problem")
        if self.file is None:
            if not self.steps:
                raise UserError(
                    "expected a problem and its solution, found "
                    f"{'nothing' if self.problem is None else 'no solution'}: give --problem and "
                    "--step, or --file (- reads stdin)"
                )
            assert self.problem is not None
            return [Unlabelled("solution", self.problem, tuple(self.steps))]
        if str(self.file) == "-":
            return solutions_of_text(sys.stdin.read(), "stdin", self.problem)
        return solutions_of_file(self.file, self.problem)


def check_solutions(
    run: Path | None, given: Given, *, cut_by: str | None, overrides: Sequence[str], as_json: bool
) -> None:
    """Prints what the judge of a run, or that of the package, says of what is given. On a terminal
    it asks for more if nothing is."""
    is_asked = given.is_nothing and sys.stdin.isatty() and not as_json
    shows_example = given.is_nothing and run is None
    solutions = [] if is_asked or shows_example else given.solutions()
    if shows_example:
        solutions = [EXAMPLE]
    # Before the judge, which takes longer.
    asked = cut_solutions(solutions, cutter_of(cut_by))
    checker = Checker.load(PACKAGED if run is None else run, overrides)
    console = Console(highlight=False)
    if run is None and not as_json:
        console.print(
            f"The judge of the package, {checker.judge.judge_id}. It knows chains of arithmetic "
            "modulo 10, and nothing else.",
            markup=False,
        )
    for start in range(0, len(asked), BLOCK):
        for found in checker.check(asked[start : start + BLOCK]):
            if as_json:
                line = {"judge": checker.judge.judge_id} | found.to_fields()
                print(json.dumps(line), flush=True)
            else:
                print_checked(console, found, checker)
    if is_asked:
        for solution in asked_for(console):
            try:
                print_checked(console, checker.check([solution])[0], checker)
            except UserError as error:
                console.print(f"error: {error}", markup=False)


def asked_for(console: Console) -> Iterator[Solution]:
    """Yields what is typed on the terminal, until an empty problem or the end of input."""
    number = 0
    while True:
        number += 1
        console.print("\nA problem of yours, in one line (an empty one ends):")
        try:
            problem = input("> ")
            if not problem.strip():
                return
            console.print("Its solution, one chunk a line (an empty line ends it):")
            chunks = list(iter(lambda: input("> ").strip(), ""))
        except EOFError:
            return
        yield Solution(f"solution {number}", problem, tuple(chunks))


# --- cutting --------------------------------------------------------------------------------------


def cut_solutions(solutions: Sequence[Unlabelled], cutter: Cutter) -> list[Solution]:
    """Returns the solutions in chunks. Those that have chunks keep them."""
    texts = [(x.solution_id, x.solution) for x in solutions if isinstance(x.solution, str)]
    for name, text in texts:
        if not text.strip():
            raise UserError(f"{name}: expected a solution, found an empty text")
    cuts = cutter(texts) if texts else []
    chunks_of = {name: chunks for (name, _), chunks in zip(texts, cuts, strict=True)}
    return [
        Solution(
            x.solution_id,
            x.question,
            chunks_of[x.solution_id] if isinstance(x.solution, str) else x.solution,
        )
        for x in solutions
    ]


def cutter_of(how: str | None) -> Cutter:
    """Returns the function that cuts solutions: by `tags`, by `blank_lines`, as a `chunk-solutions`
    run did it, or by default as `text.chunking.cut` does. Raises UserError if there is no such
    run."""
    if how not in (None, "tags", "blank_lines"):
        return model_cutter(Path(how))

    def cut_one(text: str) -> tuple[str, ...]:
        if how == "blank_lines":
            return split_solution(text, "blank_lines")
        return cut(text) if how is None else cut_at_tags(text)

    def cut_all(texts: Sequence[tuple[str, str]]) -> list[tuple[str, ...]]:
        chunks = []
        for name, text in texts:
            try:
                chunks.append(cut_one(text))
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
        return chunks

    return cut_all


def model_cutter(run: Path) -> Cutter:
    """Returns the function that cuts solutions as a finished run of `chunk-solutions` did it."""
    expected = "--cut: expected tags, blank_lines, or a finished run of chunk-solutions"
    if not (run / "config.yaml").is_file():
        raise UserError(f"{expected}, found {nothing_at(run)}")
    if (stage := read_manifest(run)["stage"]) != "chunk-solutions":
        raise UserError(f"{expected}, found a run of {stage} at {run}")
    config = validate(ChunkSolutions, read_run_settings(run), str(run))
    propose = make_proposer(config, Session(config, [], ExitStack()))

    def cut_all(texts: Sequence[tuple[str, str]]) -> list[tuple[str, ...]]:
        chunks = []
        for (name, _), proposals in zip(texts, propose(texts), strict=True):
            found, _ = most_agreed(proposals)
            if not found:
                outcomes = ", ".join(sorted({outcome.value for outcome, _ in proposals}))
                raise UserError(
                    f"{name}: the teacher of {run} proposed no cut that keeps the solution as it "
                    f"is ({outcomes}): cut it by tags or blank_lines"
                )
            chunks.append(found)
        return chunks

    return cut_all


# --- printing -------------------------------------------------------------------------------------


def print_checked(console: Console, found: CheckedSolution, checker: Checker) -> None:
    """Prints a solution with the verdict on every chunk."""
    console.print()
    console.print(Text(printable(found.solution.question), style="bold"))
    if found.unknown_words:
        console.print(Text(unknown_text(found, checker), style="yellow"))
    chunks = zip(found.solution.chunks, found.chunks, strict=True)
    for number, (text, judgment) in enumerate(chunks, 1):
        is_first = number - 1 == found.first_error
        console.print()
        console.print(Text(f"{number:3} ").append_text(verdict_text(judgment, is_first)))
        console.print(indented(text))
        print_reasoning(console, judgment)
    console.print()
    if found.whole is not None:
        console.print(Text("all ").append_text(verdict_text(found.whole, False)))
        print_reasoning(console, found.whole)
        console.print()
    if found.first_error == -1:
        console.print(Text(f"No error found in {len(found.chunks)} chunks.", style="bold green"))
    else:
        place = f"chunk {found.first_error + 1} of {len(found.chunks)}"
        console.print(Text(f"The first error is in {place}.", style="bold red"))


def print_reasoning(console: Console, judgment: ChunkJudgment) -> None:
    if judgment.completion.strip():
        console.print(indented(f"judge: {judgment.completion.strip()}", style="dim"))


def verdict_text(judgment: ChunkJudgment, is_first_error: bool) -> Text:
    mark, colour = MARKS.get(judgment.verdict, ("?", "yellow"))
    named = judgment.verdict.value if judgment.verdict.is_given else "no verdict"
    text = Text(f"{mark} {named:<10}", style=colour)
    text.append(f" P(Positive) {judgment.p_positive:.3f}", style="default")
    if is_first_error:
        counts = "" if judgment.verdict.is_given else "counts as "
        text.append(f"   {counts}the first error", style="bold red")
    return text


def indented(text: str, style: str = "") -> Padding:
    return Padding(Text(printable(text.strip()), style=style), (0, 0, 0, 6), expand=False)


def unknown_text(found: CheckedSolution, checker: Checker) -> str:
    """Returns the warning about words that the tokenizer does not know."""
    words, known = " ".join(map(printable, found.unknown_words)), known_words(checker.tokenizer)
    warning = f"Warning: the judge has never seen these words, so it guesses: {words}."
    if len(known) > MAX_LISTED:
        return warning
    return f"{warning} It knows these, with spaces between: {' '.join(known)}."
