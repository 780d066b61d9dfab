"""Compound arithmetic modulo 10, with an imperfect teacher and exactly known truth of every chunk.

    question    start 4 ; * 7 + 5 ; * 3 - 2 ; * 2 + 9 ?
    solution    <chunk> 4 * 7 = 8 ; 8 + 5 = 3 </chunk> ... <chunk> \\boxed{ 5 } </chunk>
    repair      <chunk> fix ; 4 * 7 = 8 ; 8 + 5 = 3 </chunk>      does the operation before it again
    judgment    4 * 7 = 8 8 same ; 8 + 5 = 3 3 same | \\boxed{ Positive }
    chain       such judgments, one behind another, then <judge> Positive

Every number is one digit and one token; all arithmetic is modulo 10. A chunk is one compound
operation of two lines. The judge recomputes a line, repeats the value that the chunk claims, and
says whether they are the same.

What the demonstrations teach, and what they do not:

1. The policy's teacher is wrong *systematically*: a seventh of the 250 facts (x * d, m + a, m - a)
   are hard; each has a fixed wrong value that the teacher writes with a fixed probability. Random
   slips alone would be averaged away, and greedy decoding would solve everything.
2. After a wrong chunk the teacher sometimes repairs it, so that a prefix with an error keeps a
   value above 0, as real solutions do.
3. The judge's demonstrations carry the *skill* to recompute, noisily: they know the hard facts
   better than the policy's teacher, not fully; only a part of them recompute everything, a part
   look at the last line only, and the rest glance at the chunk and guess; and a tenth of all
   verdicts are flipped. That recomputing pays, and which facts are wrong, is left to GRPO on Monte
   Carlo labels.

Truth is local: a chunk is judged by the value that the chunk before it claims.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepwiser_jax.errors import UserError
from stepwiser_jax.judges import thinkprm
from stepwiser_jax.judges.genprm import form as genprm_form
from stepwiser_jax.records import Dialogue, Problem, ProcessBenchItem, SftExample, Verdict
from stepwiser_jax.text.chunks import CHUNK_CLOSE, CHUNK_OPEN, strip_tags
from stepwiser_jax.text.prompts import (
    PromptStyle,
    bare_judge_prompt,
    parse_verdict,
    segment_prompt,
)

SUBSET = "arithmetic"
FACTORS = (2, 3, 4, 6, 7, 8, 9)
"""No 5: it maps every error to 0 or 5 and so washes most of them out."""

SPLITS = {
    "train": range(0, 10),
    "rollout": range(10, 14),
    "dev": range(14, 17),
    "test": range(17, 20),
}
"""Buckets of a question's hash, so that no question is in two splits."""

VOCABULARY = (
    "<pad> <unk> <bos> <eos> 0 1 2 3 4 5 6 7 8 9 start ; * + - = ? <chunk> </chunk> fix <judge> "
    "same diff | looks fine \\boxed{ } Positive Negative"
).split()


@dataclass(frozen=True)
class Operation:
    """value -> value * factor + sign * addend, modulo 10."""

    factor: int
    sign: str
    addend: int

    @property
    def text(self) -> str:
        return f"* {self.factor} {self.sign} {self.addend}"


@dataclass(frozen=True)
class Line:
    """`left op right = result`."""

    left: int
    op: str
    right: int
    result: int

    @property
    def text(self) -> str:
        return f"{self.left} {self.op} {self.right} = {self.result}"


def compute(left: int, op: str, right: int) -> int:
    return {"*": left * right, "+": left + right, "-": left - right}[op] % 10


def exact_lines(value: int, operation: Operation) -> tuple[Line, Line]:
    """The two right lines of one operation."""
    middle = compute(value, "*", operation.factor)
    result = compute(middle, operation.sign, operation.addend)
    return (
        Line(value, "*", operation.factor, middle),
        Line(middle, operation.sign, operation.addend, result),
    )


# --- problems -----------------------------------------------------------------------------------


def parse_question(question: str) -> tuple[int, list[Operation]]:
    """(start value, operations). Raises UserError for what is no question of this task."""
    try:
        first, *parts = question.removesuffix("?").split(";")
        word, start = first.split()
        operations = [Operation(int(f), s, int(a)) for _, f, s, a in (p.split() for p in parts)]
        if word != "start" or not operations:
            raise ValueError(word)
        return int(start), operations
    except ValueError:
        raise UserError(
            f"expected a question such as 'start 4 ; * 7 + 5 ; * 3 - 2 ?', found {question!r}"
        ) from None


def solve(question: str) -> int:
    value, operations = parse_question(question)
    for operation in operations:
        value = exact_lines(value, operation)[1].result
    return value


def generate_problems(count: int, seed: int, split: str) -> list[Problem]:
    """`count` different questions of 3 to 5 operations. Raises UserError for an unknown split."""
    if split not in SPLITS:
        raise UserError(f"expected a split of {sorted(SPLITS)}, found {split!r}")
    rng = np.random.default_rng((seed, zlib.crc32(split.encode())))
    questions: dict[str, None] = {}
    while len(questions) < count:
        operations = [
            Operation(
                int(rng.choice(FACTORS)), str(rng.choice(["+", "-"])), int(rng.integers(1, 10))
            )
            for _ in range(rng.integers(3, 6))
        ]
        parts = [f"start {rng.integers(10)}", *(operation.text for operation in operations)]
        question = " ; ".join(parts) + " ?"
        if zlib.crc32(question.encode()) % 20 in SPLITS[split]:
            questions[question] = None
    return [
        Problem(f"{SUBSET}/{split}/{i:06d}", question, str(solve(question)), SUBSET)
        for i, question in enumerate(questions)
    ]


# --- the imperfect teacher ----------------------------------------------------------------------


class Teacher:
    """Knows most facts; on hard ones it writes its fixed wrong value with a fixed probability."""

    def __init__(
        self, seed: int, *, hard_share: float = 0.13, wrong: tuple[float, float] = (0.3, 0.65)
    ):
        rng = np.random.default_rng((seed, 1))
        facts = [(x, "*", d) for x in range(10) for d in FACTORS]
        facts += [(x, op, a) for x in range(10) for op in "+-" for a in range(1, 10)]
        hard = rng.choice(len(facts), round(hard_share * len(facts)), replace=False)
        self.misbelief = {
            facts[i]: ((compute(*facts[i]) + int(rng.integers(1, 10))) % 10, rng.uniform(*wrong))
            for i in hard
        }

    def line(
        self, left: int, op: str, right: int, rng: np.random.Generator, error_scale: float = 1.0
    ) -> Line:
        """What the teacher believes; `error_scale` multiplies the chance of every misbelief."""
        wrong_value, probability = self.misbelief.get((left, op, right), (0, 0.0))
        if rng.random() < error_scale * probability:
            return Line(left, op, right, wrong_value)
        return Line(left, op, right, compute(left, op, right))

    def chunk(self, value: int, operation: Operation, rng: np.random.Generator) -> list[Line]:
        """Two lines, in one of 200 with a random slip besides."""
        first = self.line(value, "*", operation.factor, rng)
        second = self.line(first.result, operation.sign, operation.addend, rng)
        if rng.random() < 0.005:
            sign = "-" if operation.sign == "+" else "+"
            second = self.line(first.result, sign, operation.addend, rng)
        elif rng.random() < 0.005:
            second = Line(second.left, second.op, second.right, int(rng.integers(10)))
        return [first, second]


REPAIR_PROBABILITY = {False: 0.02, True: 0.3}
"""How often the teacher does an operation again, by whether it was wrong."""


def chunk_text(lines: Sequence[Line], repair: bool = False) -> str:
    parts = ["fix"] * repair + [line.text for line in lines]
    return f"{CHUNK_OPEN} {' ; '.join(parts)} {CHUNK_CLOSE}"


def answer_text(value: int) -> str:
    return f"{CHUNK_OPEN} \\boxed{{ {value} }} {CHUNK_CLOSE}"


def demonstrate(question: str, teacher: Teacher, rng: np.random.Generator) -> list[str]:
    """The teacher's solution, chunk by chunk."""
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
    """One imperfect solution of every problem."""
    teacher, rng = Teacher(seed), np.random.default_rng((seed, 2))
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
    """What a policy writes that knows no chunks."""
    return " ".join(strip_tags(solution).split())


def untagged_demonstrations(problems: Sequence[Problem], seed: int) -> list[SftExample]:
    """The same solutions without their tags."""
    return [
        dataclasses.replace(example, completion=untagged(example.completion))
        for example in policy_demonstrations(problems, seed)
    ]


def segmenter_demonstrations(problems: Sequence[Problem], seed: int) -> list[SftExample]:
    """The same solutions, to be cut: without their tags, then with them."""
    return [
        dataclasses.replace(example, prompt=segment_prompt(untagged(example.completion), "bare"))
        for example in policy_demonstrations(problems, seed)
    ]


# --- exact truth --------------------------------------------------------------------------------


@dataclass
class State:
    """Where a solution stands, by what it claims: the value, and the value one operation ago."""

    operations: list[Operation]
    value: int
    previous_value: int | None = None
    done: int = 0

    def expected(self, chunk: str) -> str | None:
        """The right chunk in this place, of the kind that `chunk` is; None: no chunk of its kind is
        right here."""
        words = chunk.split()
        if "fix" in words:
            if self.previous_value is None:
                return None
            lines = exact_lines(self.previous_value, self.operations[self.done - 1])
            return chunk_text(lines, repair=True)
        if "\\boxed{" in words:
            return answer_text(self.value) if self.done == len(self.operations) else None
        if self.done == len(self.operations):
            return None
        return chunk_text(exact_lines(self.value, self.operations[self.done]))

    def advance(self, chunk: str) -> None:
        """Go on from what the chunk claims; a chunk that claims nothing changes nothing."""
        lines = claimed_lines(chunk)
        if not lines or lines[-1][-1] not in "0123456789":
            return
        result = int(lines[-1][-1])
        if "fix" in chunk.split() and self.previous_value is not None:
            self.value = result
        elif self.done < len(self.operations):
            self.previous_value, self.value, self.done = self.value, result, self.done + 1


def digit(word: str) -> int:
    """The digit a word is; 0 for any other word, which no line may hold."""
    return int(word) if len(word) == 1 and word.isdigit() else 0


def claimed_lines(chunk: str) -> list[list[str]]:
    """The words of the `a op b = c` lines of a chunk."""
    words = " ".join(chunk.replace(CHUNK_OPEN, "").replace(CHUNK_CLOSE, "").split())
    lines = [line.split() for line in words.split(";")]
    return [line for line in lines if len(line) == 5 and line[3] == "="]


def chunk_truth(question: str, chunks: Sequence[str]) -> list[bool]:
    """For every chunk: is it right, given the values that the chunks before it claim?"""
    value, operations = parse_question(question)
    state, truth = State(operations, value), []
    for chunk in chunks:
        truth.append(" ".join(chunk.split()) == state.expected(chunk))
        state.advance(chunk)
    return truth


def first_error(question: str, chunks: Sequence[str]) -> int:
    """Index of the first wrong chunk, -1 where all are right."""
    truth = chunk_truth(question, chunks)
    return truth.index(False) if False in truth else -1


def processbench_item(
    problem: Problem, trajectory_id: str, chunks: Sequence[str], is_correct: bool
) -> ProcessBenchItem:
    """A solution with its exact first error, in ProcessBench's form."""
    return ProcessBenchItem(
        item_id=trajectory_id,
        subset=SUBSET,
        question=problem.question,
        steps=tuple(chunks),
        first_error=first_error(problem.question, chunks),
        final_answer_correct=is_correct,
    )


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
    """What the judge's teacher says of the last chunk: (analysis, verdict is Positive).

    With probability `full` it recomputes every line, with `partial` the last line only, else it
    glances and says Positive or Negative 60 to 40 whatever the chunk holds. `flip`: share of
    verdicts turned round. `error_scale`: how much of the policy teacher's misbelief it shares;
    where it `runs_code`, its verdict shares none, while its analysis still does.
    """
    mode = rng.choice(["full", "partial", "glance"], p=[full, partial, 1 - full - partial])
    analysis, positive = judge_chunk(question, chunks, mode, teacher, rng, error_scale)
    if runs_code:
        _, positive = judge_chunk(question, chunks, mode, teacher, rng, 0.0)
    return analysis, positive != (rng.random() < flip)


def demonstrate_judgment(
    question: str, chunks: Sequence[str], teacher: Teacher, rng: np.random.Generator
) -> str:
    analysis, positive = demonstrate_opinion(question, chunks, teacher, rng)
    return f"{analysis} \\boxed{{ {'Positive' if positive else 'Negative'} }}"


def judge_demonstrations(
    problems: Sequence[Problem], seed: int, *, wrong_share: float = 0.5
) -> list[SftExample]:
    """One judgment per problem, of a random chunk of an imperfect solution; where the solution has
    a wrong chunk, with probability `wrong_share` of one of those."""
    teacher, rng = Teacher(seed), np.random.default_rng((seed, 3))
    examples = []
    for problem in problems:
        chunks = demonstrate(problem.question, teacher, rng)
        wrong = [j for j, right in enumerate(chunk_truth(problem.question, chunks)) if not right]
        chosen = int(rng.integers(len(chunks)))
        if wrong and rng.random() < wrong_share:
            chosen = int(rng.choice(wrong))
        judgment = demonstrate_judgment(problem.question, chunks[: chosen + 1], teacher, rng)
        history = " ".join(chunks[:chosen])
        examples.append(
            SftExample(
                example_id=f"{problem.problem_id}/judgment",
                problem_id=problem.problem_id,
                prompt=bare_judge_prompt(problem.question, history, chunks[chosen]),
                completion=judgment,
            )
        )
    return examples


def verdict_demonstrations(problems: Sequence[Problem], seed: int) -> list[SftExample]:
    """The same judgments without their analysis."""
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
    """GenPRM's turn about the last chunk, with code: it recomputes the lines that the analysis
    recomputed. What it prints is exact where the teacher may err, and the verdict follows it (a
    tenth is flipped all the same). A teacher that recomputed nothing, such as one that glanced,
    writes no code."""
    analysis, positive = demonstrate_opinion(question, chunks, teacher, rng, runs_code=True)
    facts = _FACT.findall(analysis)
    code = "".join(f"print(({left} {op} {right}) % 10)\n" for left, op, right in facts)
    printed = "\n".join(str(compute(int(left), op, int(right))) for left, op, right in facts)
    verification = genprm_form.code_and_output(code, printed) if facts else ""
    return genprm_form.whole_turn(len(chunks) - 1, analysis, verification, is_right=positive)


def genprm_demonstrations(
    problems: Sequence[Problem], seed: int, style: PromptStyle
) -> list[Dialogue]:
    """One conversation per problem, in GenPRM's form: a judgment of every chunk of an imperfect
    solution in its turn, in the instruct form with code."""
    teacher, rng, form = Teacher(seed), np.random.default_rng((seed, 5)), genprm_form.FORMS[style]
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
    """One verification chain per problem, in ThinkPRM's form: a judgment of one chunk of an
    imperfect solution after another, until one is wrong; then the question, and yes where none
    was."""
    teacher, rng, form = Teacher(seed), np.random.default_rng((seed, 4)), thinkprm.FORMS[style]
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


def judge_chunk(
    question: str,
    chunks: Sequence[str],
    mode: str,
    teacher: Teacher,
    rng: np.random.Generator,
    error_scale: float,
) -> tuple[str, bool]:
    """(analysis, verdict is Positive) of the last chunk. With `error_scale` 0 the full analysis is
    the exact truth."""
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
        # From what the chunk itself claims for the line before: each line is checked on its own.
        left = int(exact[0][0]) if i == 0 else digit(claimed[0][-1])
        line = teacher.line(left, exact[i][1], int(exact[i][2]), rng, error_scale)
        same = " ".join(claimed[i]) == line.text
        parts.append(f"{line.text} {claimed[i][-1]} {'same' if same else 'diff'}")
        verdict = verdict and same
    return " ; ".join(parts) + " |", verdict


# --- the tiny model -----------------------------------------------------------------------------


def write_tokenizer(directory: str | Path) -> None:
    """An ordinary word-level tokenizer.json: words are split at spaces and joined by them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(str(directory))


def hf_config() -> dict[str, Any]:
    """config.json of the tiny model: 0.56M parameters, a llama in miniature."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(VOCABULARY),
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "initializer_range": 0.05,
        "bos_token_id": VOCABULARY.index("<bos>"),
        "eos_token_id": VOCABULARY.index("<eos>"),
        "pad_token_id": VOCABULARY.index("<pad>"),
    }
