"""Demonstrations of the embedded tasks, by an imperfect teacher.

    judgment    4 * 7 = 8 8 same ; 8 + 5 = 3 3 same | \\boxed{ Positive }
    chain       such judgments, one after another, then <judge> Positive

The judge recomputes a line, repeats the value that the chunk claims, and says whether they are the
same.

What the demonstrations teach, and what they do not:

1. The policy's teacher is wrong *systematically*. A seventh of the 250 facts (x * d, m + a, m - a)
   are hard. Each of these has a fixed wrong value that the teacher writes with a fixed probability.
   Random slips alone would be averaged away, and greedy decoding would solve everything.
2. After a wrong chunk the teacher sometimes repairs it, so that a prefix with an error keeps a
   value above 0, as real solutions do.
3. The judge's demonstrations carry the *skill* to recompute, noisily. They know the hard facts
   better than the policy's teacher, but not fully. Some of them recompute everything, some look at
   the last line only, and the rest glance at the chunk and guess. Otherwise verdicts follow from
   the exact truth, as far as the facts are known; a tenth of all are flipped. GRPO on Monte Carlo
   labels must teach that recomputing pays. Most facts are known by then.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from stepwiser_jax.errors import UserError
from stepwiser_jax.judges import thinkprm
from stepwiser_jax.judges.genprm import form as genprm_form
from stepwiser_jax.records import ClassifierExample, Dialogue, Problem, SftExample, Verdict
from stepwiser_jax.tasks.arithmetic import (
    MOD_10,
    TASKS,
    ArithmeticTask,
    Line,
    Operation,
    State,
    answer_text,
    chunk_text,
    chunk_truth,
    claimed_lines,
    compute,
    exact_lines,
    generate_problems,
    parse_question,
    task_of,
)
from stepwiser_jax.text.chunks import strip_tags
from stepwiser_jax.text.prompts import (
    PromptStyle,
    bare_judge_prompt,
    chunking_prompt,
    parse_verdict,
)

# --- the teacher ----------------------------------------------------------------------------------


class Teacher:
    """A teacher that knows most facts. For a hard one it writes a fixed wrong value with a fixed
    probability."""

    def __init__(
        self,
        seed: int,
        task: ArithmeticTask = MOD_10,
        *,
        hard_share: float = 0.13,
        wrong: tuple[float, float] = (0.3, 0.65),
    ):
        self.task, modulus = task, task.modulus
        rng, facts = np.random.default_rng((seed, 1)), task.facts

        def wrong_value(fact: tuple[int, str, int]) -> int:
            return (compute(*fact, modulus) + int(rng.integers(1, modulus))) % modulus

        hard = rng.choice(len(facts), round(hard_share * len(facts)), replace=False)
        self.misbelief = {facts[i]: (wrong_value(facts[i]), rng.uniform(*wrong)) for i in hard}

    def line(
        self, left: int, op: str, right: int, rng: np.random.Generator, error_scale: float = 1.0
    ) -> Line:
        """Returns what the teacher believes. `error_scale` multiplies the chance of a misbelief."""
        wrong_value, probability = self.misbelief.get((left, op, right), (0, 0.0))
        if rng.random() < error_scale * probability:
            return Line(left, op, right, wrong_value)
        return Line(left, op, right, compute(left, op, right, self.task.modulus))

    def chunk(self, value: int, operation: Operation, rng: np.random.Generator) -> list[Line]:
        """Returns two lines. One of 100 chunks has a random slip."""
        first = self.line(value, *operation.first, rng)
        second = self.line(first.result, *operation.second, rng)
        if rng.random() < 0.005:
            other = next(op for op in self.task.numbers[1] if op != second.op)
            second = self.line(first.result, other, second.right, rng)
        elif rng.random() < 0.005:
            result = int(rng.integers(self.task.modulus))
            second = Line(second.left, second.op, second.right, result)
        return [first, second]


def teacher_of(problems: Sequence[Problem], seed: int) -> Teacher:
    """Returns the teacher of the task that these problems are of."""
    return Teacher(seed, task_of(problems[0].question) or MOD_10)


REPAIR_PROBABILITY = {False: 0.02, True: 0.3}
"""The probability that the teacher does an operation again, by whether it was wrong."""


def demonstrate(question: str, teacher: Teacher, rng: np.random.Generator) -> list[str]:
    """Returns the teacher's solution as chunks."""
    value, operations = parse_question(question)
    chunks = []
    for operation in operations:
        lines = teacher.chunk(value, operation, rng)
        chunks.append(chunk_text(lines))
        is_wrong = tuple(lines) != exact_lines(value, operation)
        if rng.random() < REPAIR_PROBABILITY[is_wrong]:
            lines = list(exact_lines(value, operation)) if is_wrong else lines
            chunks.append(chunk_text(lines, repair=True))
        value = lines[-1].result
    return [*chunks, answer_text(value)]


def policy_demonstrations(problems: Sequence[Problem], seed: int) -> list[SftExample]:
    """Returns one imperfect solution of every problem."""
    teacher, rng = teacher_of(problems, seed), np.random.default_rng((seed, 2))
    return [
        SftExample(
            example_id=f"{problem.problem_id}/demonstration",
            problem_id=problem.problem_id,
            prompt=problem.question,
            completion=" ".join(demonstrate(problem.question, teacher, rng)),
        )
        for problem in problems
    ]


def untagged(solution: str) -> str:
    """Returns the solution as a policy writes it that does not mark chunks."""
    return " ".join(strip_tags(solution).split())


def untagged_demonstrations(problems: Sequence[Problem], seed: int) -> list[SftExample]:
    """Returns the same solutions without their tags."""
    return [
        dataclasses.replace(example, completion=untagged(example.completion))
        for example in policy_demonstrations(problems, seed)
    ]


def segmenter_demonstrations(problems: Sequence[Problem], seed: int) -> list[SftExample]:
    """Returns prompts with a solution without tags, and the same solution with tags as the
    completion."""
    return [
        dataclasses.replace(example, prompt=chunking_prompt(untagged(example.completion), "bare"))
        for example in policy_demonstrations(problems, seed)
    ]


# --- the judge's cold start ---------------------------------------------------------------------


def demonstrate_opinion(
    question: str,
    chunks: Sequence[str],
    teacher: Teacher,
    rng: np.random.Generator,
    *,
    runs_code: bool = False,
    full: float = 0.40,
    partial: float = 0.45,
    flip: float = 0.1,
    error_scale: float = 0.4,
) -> tuple[str, bool]:
    """Returns the analysis of the last chunk, and whether the verdict is Positive.

    Args:
        question: The problem.
        chunks: The solution up to the chunk that is judged.
        teacher: The policy's teacher.
        rng: Decides how this judgment is made.
        runs_code: Whether the verdict is free of misbelief, as if code had run; the analysis never
            is.
        full: Probability of recomputing every line.
        partial: Probability of recomputing the last line only. With the remaining probability the
            judge glances, and says Positive in 60% of the cases, whatever the chunk holds.
        flip: Share of verdicts that are flipped.
        error_scale: How much of the teacher's misbelief the judge shares.
    """
    mode = rng.choice(["full", "partial", "glance"], p=[full, partial, 1 - full - partial])
    analysis, positive = judge_chunk(question, chunks, mode, teacher, rng, error_scale)
    if runs_code:
        _, positive = judge_chunk(question, chunks, mode, teacher, rng, 0.0)
    return analysis, positive != (rng.random() < flip)


def demonstrate_judgment(
    question: str, chunks: Sequence[str], teacher: Teacher, rng: np.random.Generator
) -> str:
    """Returns a judgment of the last chunk as text."""
    analysis, positive = demonstrate_opinion(question, chunks, teacher, rng)
    return f"{analysis} \\boxed{{ {'Positive' if positive else 'Negative'} }}"


def judged_chunks(
    problems: Sequence[Problem], seed: int, wrong_share: float = 0.5
) -> Iterator[tuple[Problem, list[str], str]]:
    """Yields for every problem an imperfect solution up to a random chunk, and a judgment of that
    chunk. If the solution has wrong chunks, one is chosen with probability `wrong_share`."""
    teacher, rng = teacher_of(problems, seed), np.random.default_rng((seed, 3))
    for problem in problems:
        chunks = demonstrate(problem.question, teacher, rng)
        wrong = [j for j, right in enumerate(chunk_truth(problem.question, chunks)) if not right]
        chosen = int(rng.integers(len(chunks)))
        if wrong and rng.random() < wrong_share:
            chosen = int(rng.choice(wrong))
        so_far = chunks[: chosen + 1]
        yield problem, so_far, demonstrate_judgment(problem.question, so_far, teacher, rng)


def judge_demonstrations(problems: Sequence[Problem], seed: int) -> list[SftExample]:
    """Returns the judgments of `judged_chunks`."""
    return [
        SftExample(
            example_id=f"{problem.problem_id}/judgment",
            problem_id=problem.problem_id,
            prompt=bare_judge_prompt(problem.question, " ".join(history), chunk),
            completion=judgment,
        )
        for problem, (*history, chunk), judgment in judged_chunks(problems, seed)
    ]


def labelled_truth(problems: Sequence[Problem], seed: int) -> list[ClassifierExample]:
    """Returns the same chunks with their exact truth in place of a judgment."""
    examples = []
    for problem, chunks, _ in judged_chunks(problems, seed):
        is_right = chunk_truth(problem.question, chunks)[-1]
        examples.append(
            ClassifierExample(
                solution_id=f"{problem.problem_id}/truth",
                problem_id=problem.problem_id,
                question=problem.question,
                chunks=tuple(chunks),
                labelled=(len(chunks) - 1,),
                is_positive=(is_right,),
                q=(float(is_right),),
            )
        )
    return examples


def verdict_demonstrations(problems: Sequence[Problem], seed: int) -> list[SftExample]:
    """Returns the same judgments without their analysis."""
    return [
        dataclasses.replace(
            example, completion=example.completion[example.completion.index("\\boxed") :]
        )
        for example in judge_demonstrations(problems, seed)
    ]


_FACT = re.compile(r"(\d) ([*+-]) (\d) =")


def demonstrate_turn(
    question: str, chunks: Sequence[str], teacher: Teacher, rng: np.random.Generator
) -> str:
    """Returns GenPRM's turn about the last chunk. Its code recomputes the lines that the analysis
    recomputed. What the code prints is exact although the teacher may err, and the verdict follows
    it (but a tenth are flipped). A teacher that recomputed nothing writes no code."""
    analysis, positive = demonstrate_opinion(question, chunks, teacher, rng, runs_code=True)
    facts = _FACT.findall(analysis)
    modulus = teacher.task.modulus
    code = "".join(f"print(({left} {op} {right}) % {modulus})\n" for left, op, right in facts)
    printed = "\n".join(str(compute(int(x), op, int(y), modulus)) for x, op, y in facts)
    verification = genprm_form.code_and_output(code, printed) if facts else ""
    return genprm_form.whole_turn(len(chunks) - 1, analysis, verification, is_right=positive)


def genprm_demonstrations(
    problems: Sequence[Problem], seed: int, style: PromptStyle
) -> list[Dialogue]:
    """Returns one conversation per problem in GenPRM's form. A turn judges each chunk of an
    imperfect solution; in the instruct form it has code."""
    teacher, rng, form = (
        teacher_of(problems, seed),
        np.random.default_rng((seed, 5)),
        genprm_form.FORMS[style],
    )
    say = demonstrate_judgment if style == "bare" else demonstrate_turn
    dialogues = []
    for problem in problems:
        question, chunks = problem.question, demonstrate(problem.question, teacher, rng)
        turns = [say(question, chunks[: t + 1], teacher, rng) for t in range(len(chunks))]
        roles, texts = genprm_form.conversation(question, chunks, turns, form)
        name = f"{problem.problem_id}/dialogue"
        dialogues.append(Dialogue(name, problem.problem_id, roles, texts))
    return dialogues


def thinkprm_demonstrations(
    problems: Sequence[Problem], seed: int, style: PromptStyle
) -> list[SftExample]:
    """Returns one verification chain per problem in ThinkPRM's form. It judges the chunks of an
    imperfect solution until one is wrong, then says whether all are correct."""
    teacher, rng, form = (
        teacher_of(problems, seed),
        np.random.default_rng((seed, 4)),
        thinkprm.FORMS[style],
    )
    examples = []
    for problem in problems:
        chunks = demonstrate(problem.question, teacher, rng)
        analyses, verdicts = [], []
        while len(verdicts) < len(chunks) and Verdict.NEGATIVE not in verdicts:
            so_far = chunks[: len(verdicts) + 1]
            judgment = demonstrate_judgment(problem.question, so_far, teacher, rng)
            analyses.append(judgment.split(" \\boxed")[0])
            verdicts.append(parse_verdict(judgment))
        chain, is_correct = form.chain(analyses, verdicts), Verdict.NEGATIVE not in verdicts
        examples.append(
            SftExample(
                example_id=f"{problem.problem_id}/verification",
                problem_id=problem.problem_id,
                prompt=thinkprm.verify_prompt(problem.question, chunks, style),
                completion=form.whole(chain, is_correct),
            )
        )
    return examples


def _digit(word: str) -> int:
    """Returns the digit that a word is, or 0 for a word that is none."""
    return int(word) if len(word) == 1 and word.isdigit() else 0


def judge_chunk(
    question: str,
    chunks: Sequence[str],
    mode: str,
    teacher: Teacher,
    rng: np.random.Generator,
    error_scale: float,
) -> tuple[str, bool]:
    """Returns the analysis of the last chunk, and whether the verdict is Positive. With
    `error_scale` 0 the full analysis is the exact truth."""
    if mode == "glance":
        return "looks fine", bool(rng.random() < 0.6)
    value, operations = parse_question(question)
    state = State(operations, value)
    for chunk in chunks[:-1]:
        state.advance(chunk)
    expected = state.expected(chunks[-1])
    if expected is None:
        return "? diff |", False
    if "\\boxed{" in expected:
        claimed = chunks[-1].split()[2]
        same = chunks[-1] == expected
        return f"{state.value} {claimed} {'same' if same else 'diff'} |", same
    parts, verdict = [], True
    claimed = claimed_lines(chunks[-1])
    exact = claimed_lines(expected)
    for i in [1] if mode == "partial" else [0, 1]:
        if i >= len(claimed):
            return " ; ".join([*parts, "? diff |"]), False
        # Each line is checked alone, so it starts from what the chunk claims for the line before.
        left = int(exact[0][0]) if i == 0 else _digit(claimed[0][-1])
        line = teacher.line(left, exact[i][1], int(exact[i][2]), rng, error_scale)
        same = " ".join(claimed[i]) == line.text
        parts.append(f"{line.text} {claimed[i][-1]} {'same' if same else 'diff'}")
        verdict = verdict and same
    return " ; ".join(parts) + " |", verdict


# --- by name --------------------------------------------------------------------------------------

Examples = list[SftExample] | list[Dialogue]


def _demonstrate(
    make: Callable[..., Examples],
    task: ArithmeticTask,
    *,
    count: int | None,
    seed: int,
    style: PromptStyle,
    styled: bool = False,
) -> Examples:
    """Returns demonstrations of `count` problems. Raises UserError without a count."""
    if count is None:
        raise UserError("examples.limit must say how many examples of the task to generate")
    problems = generate_problems(count, seed, "train", task)
    return make(problems, seed, style) if styled else make(problems, seed)


EXAMPLES: dict[str, Callable[..., Examples]] = {
    f"{task.name}-{name}": functools.partial(_demonstrate, make, task, styled=styled)
    for task in TASKS
    for name, make, styled in (
        ("policy", policy_demonstrations, False),
        ("untagged", untagged_demonstrations, False),
        ("segmenter", segmenter_demonstrations, False),
        ("judge", judge_demonstrations, False),
        ("verdicts", verdict_demonstrations, False),
        ("genprm", genprm_demonstrations, True),
        ("thinkprm", thinkprm_demonstrations, True),
    )
}
"""The sources of examples that configs name. A config may name a user's function instead, as
`module:function`: (*, count, seed, style) -> list of SftExample or Dialogue records."""
