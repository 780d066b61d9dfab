"""Reads data sets whose steps others have labelled, and turns them into what judges learn from.

The columns of a row tell its format:

    PRM800K         question.problem, label.steps     ratings -1, 0, 1 of several completions a step
    Math-Shepherd   input, label                      + and -, or values, in the places of its tags
    Math-APS        question, reasoning_steps         Monte Carlo values, of a tree or of prefixes
    PRMBench        modified_process, error_steps     1-based indices of the wrong steps; those past
                                                      the last step are ignored, as by its scorer
    ProcessBench    problem, steps, label             index of the first wrong step, -1: none
    TRL's stepwise  prompt, completions, labels       true, false or a value for every step

Labels are between 0 and 1, and none is lost: -1, 0, 1 become 0, 0.5, 1. A step is wrong if its
label is 0, as in Math-Shepherd's hard labels and StepWiser's Abs-Q; so neutral steps are right, as
in ProcessBench's PRM800K baseline. Texts stay as they are. What is not about steps is not read: who
solved and who labelled, when and why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import NoneType
from typing import Any

from stepwiser_jax.errors import UserError
from stepwiser_jax.records import (
    ClassifierExample,
    JudgeExample,
    LabelledSolution,
    PrmBenchItem,
    ProcessBenchItem,
)
from stepwiser_jax.rl.examples import judge_example
from stepwiser_jax.tasks.mathematics import compare_plainly

Row = dict[str, Any]
Step = tuple[str, float | None]
"""A step with its label."""

STEP_TAG = "ки"
"""Math-Shepherd's mark after every step."""

BAD_PROBLEM = "bad_problem"
"""PRM800K's `finish_reason` if the labeller found the problem itself wrong."""

_LABEL = re.compile(r"[+-]|[01](\.\d+)?")

_WITH_ORIGINAL = "redundency"
"""PRMBench's class, in its spelling, whose rows also give the original solution."""

RATINGS = {-1: 0.0, 0: 0.5, 1: 1.0, None: None}
"""PRM800K's ratings as labels. A step that a labeller wrote has no rating."""


def parse_solutions(row: Row, row_id: str) -> list[LabelledSolution]:
    """Returns the solutions in one row; their ids begin with `row_id`, or are the row's own. Raises
    UserError for a row of no known format."""
    for matches, parse in _FORMATS:
        if matches(row):
            return parse(row, row_id)
    raise UserError(
        "expected the columns of PRM800K (question.problem, label.steps), Math-Shepherd (input, "
        "label), Math-APS (question, reasoning_steps), PRMBench (modified_process, error_steps), "
        "ProcessBench (problem, steps, label) or TRL's stepwise supervision (prompt, completions, "
        f"labels), found {sorted(row)}"
    )


def to_judge_examples(solutions: Iterable[LabelledSolution]) -> Iterator[JudgeExample]:
    """Yields one example per labelled step, up to and including the first error: after it there is
    nothing to judge. Steps that solutions share are used once."""
    for solution in to_classifier_examples(solutions):
        for index, step in enumerate(solution.labelled):
            yield judge_example(solution, index, "\n\n".join(solution.chunks[:step]))


def to_classifier_examples(solutions: Iterable[LabelledSolution]) -> Iterator[ClassifierExample]:
    """Yields the same steps, in one example per solution. Their soft labels are the labels
    themselves, except for a wrong step that a later right one makes right."""
    for solution in solutions:
        labelled = _labelled_steps(solution)
        if labelled:
            is_positive = tuple(step != solution.first_error for step in labelled)
            soft = [solution.labels[step] or 0.0 for step in labelled]
            yield ClassifierExample(
                solution_id=solution.solution_id,
                problem_id=solution.problem_id,
                question=solution.question,
                chunks=solution.steps,
                labelled=tuple(labelled),
                is_positive=is_positive,
                q=tuple(q or float(right) for q, right in zip(soft, is_positive, strict=True)),
            )


def _labelled_steps(solution: LabelledSolution) -> list[int]:
    """Returns the solution's own labelled steps, up to and including the first error."""
    error = solution.first_error
    end = len(solution.steps) if error == -1 else error + 1
    steps = range(solution.shared_steps, end)
    return [step for step in steps if solution.labels[step] is not None]


def to_processbench_items(solutions: Iterable[LabelledSolution]) -> list[ProcessBenchItem]:
    """Returns the whole solutions: those labelled up to their end or first error, for which it is
    known whether the final answer is right. Raises UserError if there is none."""
    items = [
        ProcessBenchItem(
            item_id=solution.solution_id,
            subset=solution.source,
            question=solution.question,
            steps=solution.steps,
            first_error=solution.first_error,
            final_answer_correct=solution.final_answer_correct,
        )
        for solution in solutions
        if solution.final_answer_correct is not None
        and (solution.first_error != -1 or solution.labels[-1] is not None)
        and solution.finish_reason != BAD_PROBLEM
    ]
    if not items:
        raise UserError(
            "expected a whole solution, of which it is known whether its final answer is right, "
            "labelled up to its end or its first error: found none"
        )
    return items


# --- the formats ----------------------------------------------------------------------------------


def _prm800k(row: Row, row_id: str) -> list[LabelledSolution]:
    """Returns the path that the labeller took, and a branch for every completion beside it.

    In phase 2, labelling stops at the first error; the rest of the model's solution then follows
    without labels."""
    question, label = _field(row, "question", dict), _field(row, "label", dict)
    path, branches = _path_and_branches(_field(label, "steps", list))
    finish_reason = _field(label, "finish_reason", str, or_none=True)
    rest, found = _end_of_path(question, [text for text, _ in path], finish_reason)
    path += [(text, None) for text in rest]
    answer = _field(question, "ground_truth_answer", str, or_none=True)
    is_right = None if found is None or answer is None else compare_plainly(found, answer)
    solutions = [(0, path)] if path else []
    solutions += [(shared, [*path[:shared], step]) for shared, step in branches]
    return [
        LabelledSolution(
            solution_id=f"{row_id}#{k}",
            problem_id=row_id,
            source="prm800k",
            question=_field(question, "problem", str),
            answer=answer,
            steps=tuple(text for text, _ in steps),
            labels=tuple(label for _, label in steps),
            cumulative=True,
            shared_steps=shared,
            final_answer_correct=is_right if k == 0 else None,
            finish_reason=finish_reason,
        )
        for k, (shared, steps) in enumerate(solutions)
    ]


def _path_and_branches(steps: Sequence[Any]) -> tuple[list[Step], list[tuple[int, Step]]]:
    """Returns the steps that the labeller chose or wrote, and the others, each with the number of
    steps before it."""
    path: list[Step] = []
    branches: list[tuple[int, Step]] = []
    ended = False
    for number, step in enumerate(steps, 1):
        rated = _field(step, "completions", list, or_none=True) or []
        completions = [_completion(completion) for completion in rated]
        chosen = _field(step, "chosen_completion", int, or_none=True)
        if chosen is not None and not 0 <= chosen < len(completions):
            raise UserError(
                f"step {number}: expected 'chosen_completion' from 0 to {len(completions) - 1}, "
                f"found {chosen}"
            )
        if step.get("human_completion") is not None:
            completions.append(_completion(step["human_completion"]))
            chosen = len(completions) - 1 if chosen is None else chosen
        if not completions:
            continue
        if ended:
            raise UserError(f"step {number} goes on after a step of which nothing was chosen")
        ended = chosen is None
        path.append(completions.pop(chosen or 0))
        branches += [(len(path) - 1, completion) for completion in completions]
    return path, branches


def _end_of_path(
    question: Row, path: Sequence[str], finish_reason: str | None
) -> tuple[list[str], str | None]:
    """Returns the steps of the model's solution after the labelled ones, and the final answer, None
    if the path does not reach one."""
    has_solution = bool(question.get("pre_generated_steps"))
    generated = _texts(question, "pre_generated_steps") if has_solution else []
    if generated and generated[: len(path)] == path:
        found = _field(question, "pre_generated_answer", str, or_none=True)
        return generated[len(path) :], found
    if finish_reason == "solution" and path and "# Answer" in path[-1]:
        return [], path[-1].rsplit("# Answer", 1)[1].strip()
    return [], None


def _completion(completion: Any) -> Step:
    text = _field(completion, "text", str)
    rating = completion.get("rating")
    if type(rating) not in (int, NoneType) or rating not in RATINGS:
        raise UserError(f"expected a 'rating' of -1, 0, 1 or null, found {rating!r}")
    return text, RATINGS[rating]


def _math_shepherd(row: Row, row_id: str) -> list[LabelledSolution]:
    """Reads `input`, which is `QUESTION Step 1: ... ки\\nStep 2: ... ки`, and `label`, which is the
    same with labels instead of the tags. The last label says whether the final answer is right."""
    text, label = _field(row, "input", str), _field(row, "label", str)
    *pieces, rest = text.split(STEP_TAG)
    if not pieces or rest.strip() or "Step 1:" not in pieces[0]:
        raise UserError(
            f"expected 'input' to be a question, then 'Step 1:' and steps that end with "
            f"{STEP_TAG!r}, found {text[:80]!r} ... {text[-40:]!r}"
        )
    labels: list[float | None] = []
    position = 0
    for step, piece in enumerate(pieces, 1):
        match = _LABEL.match(label, position + len(piece))
        if not label.startswith(piece, position) or match is None:
            raise UserError(
                f"step {step}: expected 'label' to be 'input' with +, - or a value for every "
                f"{STEP_TAG!r}, found {label[position : position + len(piece) + 10]!r}"
            )
        labels.append(_value({"+": 1.0, "-": 0.0}.get(match[0], match[0])))
        position = match.end()
    task = _field(row, "task", str, or_none=True)
    begin = pieces[0].rindex("Step 1:")
    question, pieces[0] = pieces[0][:begin], pieces[0][begin:]
    return [
        LabelledSolution(
            solution_id=row_id,
            problem_id=row_id,
            source="math-shepherd" if task is None else f"math-shepherd/{task}",
            question=question.removesuffix(" "),
            answer=None,
            steps=tuple(piece.removeprefix("\n").removesuffix(" ") for piece in pieces),
            labels=tuple(labels),
            cumulative=True,
            final_answer_correct=labels[-1] != 0,
        )
    ]


def _math_aps(row: Row, row_id: str) -> list[LabelledSolution]:
    """Returns every path from the root of the tree, which is the question, to a leaf."""
    question, tree = _field(row, "question", str), row["reasoning_steps"]
    root = _tree_of_prefixes(question, tree) if isinstance(tree, list) else tree
    if _field(root, "text", str) != question:
        raise UserError("expected 'reasoning_steps' to begin with the question")
    value = root.get("mc_value")
    solutions: list[LabelledSolution] = []

    def walk(node: Row, path: list[Step], shared: int) -> None:
        children = _field(node, "children", list, or_none=True) or []
        for n, child in enumerate(children):
            step = _field(child, "text", str), _value(child.get("mc_value"))
            walk(child, [*path, step], len(path) if n else shared)
        if path and not children:
            solutions.append(
                LabelledSolution(
                    solution_id=f"{row_id}#{len(solutions)}",
                    problem_id=row_id,
                    source="math-aps",
                    question=question,
                    answer=_field(row, "final_answer", str, or_none=True),
                    steps=tuple(text for text, _ in path),
                    labels=tuple(value for _, value in path),
                    cumulative=True,
                    shared_steps=shared,
                    question_value=None if value is None else _value(value),
                )
            )

    walk(root, [], 0)
    return solutions


def _tree_of_prefixes(question: str, prefixes: Sequence[Any]) -> Row:
    """Makes every prefix a child of the longest other one that it continues after a blank line."""
    root: Row = {"text": question, "mc_value": None, "children": []}
    nodes = {question: root}
    for prefix in sorted(prefixes, key=lambda p: len(_field(p, "solution_prefix", str))):
        text, value = prefix["solution_prefix"], _value(prefix.get("mc_value"))
        if text == question and root["mc_value"] is None:
            root["mc_value"] = value
            continue
        parents = [known for known in nodes if text.startswith(known + "\n\n")]
        if not parents:
            raise UserError(f"expected prefixes that begin with the question, found {text[:80]!r}")
        parent = max(parents, key=len)
        step = {"text": text[len(parent) + 2 :], "mc_value": value, "children": []}
        nodes[parent]["children"].append(step)
        nodes.setdefault(text, step)
    return root


def _prmbench(row: Row, row_id: str) -> list[LabelledSolution]:
    """Returns the solutions of `prmbench_items`, each step with its own label."""
    return [
        LabelledSolution(
            solution_id=f"{row_id}#{k}",
            problem_id=row_id,
            source=f"prmbench/{item.subset}",
            question=item.question,
            answer=None,
            steps=item.steps,
            labels=tuple(float(item.is_right(step)) for step in range(len(item.steps))),
            cumulative=False,
        )
        for k, item in enumerate(prmbench_items(row))
    ]


def _prmbench_steps(row: Row) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Returns the modified steps, and the 0-based indices of the wrong ones."""
    steps = tuple(_texts(row, "modified_process"))
    wrong = _field(row, "error_steps", list)
    if not all(type(step) is int and step >= 1 for step in wrong):
        raise UserError(f"expected 'error_steps', integers from 1 on, found {wrong}")
    return steps, tuple(sorted({step - 1 for step in wrong if step <= len(steps)}))


def is_prmbench(row: Row) -> bool:
    """Returns whether a row has PRMBench's columns."""
    return row.get("modified_process") is not None


def error_steps_past_the_end(row: Row) -> int:
    """Returns how many of a PRMBench row's `error_steps` its solution does not have: they are
    ignored. About 1.6% of the rows have such steps."""
    steps, _ = _prmbench_steps(row)
    return sum(step > len(steps) for step in row["error_steps"])


def prmbench_items(row: Row) -> list[PrmBenchItem]:
    """Returns a PRMBench row's modified solution with its wrong steps, and for rows of the class
    `redundency` the original too. Each original is in the benchmark once for every class, and the
    benchmark's own loader also takes it from this one: 758 originals and 6,211 others.

    Raises UserError for a row without PRMBench's columns.
    """
    kind, row_id = _field(row, "classification", str), _field(row, "idx", str)
    steps, wrong = _prmbench_steps(row)
    question = _field(row, "modified_question", str)
    items = [PrmBenchItem(f"{kind}_{row_id}", kind, question, steps, wrong)]
    if kind == _WITH_ORIGINAL:
        original = tuple(_texts(row, "original_process"))
        question = _field(row, "original_question", str)
        items.append(PrmBenchItem(f"correct_{row_id}", "correct", question, original, ()))
    return items


def _processbench(row: Row, row_id: str) -> list[LabelledSolution]:
    """Reads ProcessBench's rows, and our ProcessBenchItem records."""
    item_id, question = _first(row, "item_id", "id"), _first(row, "question", "problem")
    steps, label = _first(row, "steps"), _first(row, "label", "first_error")
    final = _first(row, "final_answer_correct")
    is_right = {
        "an 'id', a text": isinstance(item_id, str),
        "a 'problem', a text": isinstance(question, str),
        "'steps', a list of at least one": isinstance(steps, list)
        and bool(steps)
        and all(isinstance(step, str) for step in steps),
        "a 'label', the index of a step": type(label) is int,
        "'final_answer_correct', true or false": isinstance(final, bool),
    }
    if not all(is_right.values()):
        missing = "; ".join(name for name, right in is_right.items() if not right)
        raise UserError(f"expected {missing}, found the columns {sorted(row)}")
    if not -1 <= label < len(steps):
        raise UserError(
            f"expected a label from -1 to {len(steps) - 1} for {len(steps)} steps, found {label}"
        )
    labels: list[float | None] = [1.0] * len(steps)
    if label != -1:
        labels[label:] = [0.0] + [None] * (len(steps) - label - 1)
    return [
        LabelledSolution(
            solution_id=item_id,
            problem_id=item_id,
            source=_field(row, "subset", str, or_none=True) or item_id.rsplit("-", 1)[0],
            question=question,
            answer=None,
            steps=tuple(steps),
            labels=tuple(labels),
            cumulative=True,
            final_answer_correct=final,
        )
    ]


def _stepwise(row: Row, row_id: str) -> list[LabelledSolution]:
    """Reads stepwise supervision as TRL up to 1.13 had it: texts and their labels, of which nothing
    says whether they reach a final answer."""
    steps, labels = _texts(row, "completions"), _field(row, "labels", list)
    if len(steps) != len(labels):
        raise UserError(
            f"expected a label for each of 'completions', found {len(labels)} labels of "
            f"{len(steps)} texts"
        )
    return [
        LabelledSolution(
            solution_id=row_id,
            problem_id=row_id,
            source="stepwise",
            question=_field(row, "prompt", str),
            answer=None,
            steps=tuple(steps),
            labels=tuple(map(_value, labels)),
            cumulative=True,
        )
    ]


_FORMATS: tuple[tuple[Callable[[Row], bool], Callable[[Row, str], list[LabelledSolution]]], ...] = (
    (lambda row: isinstance(row.get("question"), dict), _prm800k),
    (lambda row: row.get("input") is not None, _math_shepherd),
    (lambda row: row.get("reasoning_steps") is not None, _math_aps),
    (is_prmbench, _prmbench),
    (lambda row: row.get("steps") is not None, _processbench),
    (lambda row: row.get("completions") is not None, _stepwise),
)


# --- fields, checked ------------------------------------------------------------------------------

_KINDS = {str: "a text", list: "a list", dict: "an object", int: "an integer"}


def _field(row: Any, name: str, kind: type, *, or_none: bool = False) -> Any:
    """Returns a field of a row. Raises UserError unless it has that type. (A missing field may be
    None: tables have all columns in all rows.)"""
    value = row.get(name) if isinstance(row, dict) else None
    if type(value) is not kind and not (or_none and value is None and isinstance(row, dict)):
        found = sorted(row) if isinstance(row, dict) and value is None else repr(value or row)[:80]
        raise UserError(f"expected {name!r}, {_KINDS[kind]}, found {found}")
    return value


def _texts(row: Row, name: str) -> list[str]:
    texts = _field(row, name, list)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"expected {name!r}, a list of at least one text, found {texts!r:.80}")
    return texts


def _value(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number <= 1:
        raise UserError(f"expected a value between 0 and 1, found {value!r}")
    return number


def _first(row: Row, *columns: str) -> Any:
    """Returns the value of the first column that has one, None if none has."""
    return next((row[column] for column in columns if row.get(column) is not None), None)
