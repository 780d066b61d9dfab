"""The embedded tasks: compound arithmetic modulo 10, and modulo 7, with exact truth of every chunk.

    question    start 4 ; * 7 + 5 ; * 3 - 2 ; * 2 + 9 ?
    solution    <chunk> 4 * 7 = 8 ; 8 + 5 = 3 </chunk> ... <chunk> \\boxed{ 5 } </chunk>
    repair      <chunk> fix ; 4 * 7 = 8 ; 8 + 5 = 3 </chunk>      does the operation before it again

Every number is one digit and one token. A chunk is one compound operation of two lines. Truth is
local: a chunk is judged by the value that the chunk before it claims.

`MOD_10` above is the task that everything was tuned on. `MOD_7` has other operations:

    question    = 4 ; + 5 * 3 ; * 2 - 6 ; + 1 - 4 ?

`tasks.arithmetic_demonstrations` makes examples to learn from.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepwiser_jax.errors import UserError
from stepwiser_jax.records import Problem, ProcessBenchItem
from stepwiser_jax.text.chunks import CHUNK_CLOSE, CHUNK_OPEN, tagged


@dataclass(frozen=True)
class ArithmeticTask:
    """What one task has of its own.

    Attributes:
        name: The `source` of its problems, and the subset of its benchmark items.
        modulus: Every number is below it.
        opening: The word before a question's first value. It tells the tasks apart.
        numbers: For the first and for the second line of an operation: its operators, each with
            the right operands that it takes.
    """

    name: str
    modulus: int
    opening: str
    numbers: tuple[dict[str, Sequence[int]], dict[str, Sequence[int]]]

    @property
    def facts(self) -> list[tuple[int, str, int]]:
        """All that can stand on the left side of a line: (left, op, right)."""
        found = [
            (left, op, right)
            for of_line in self.numbers
            for left in range(self.modulus)
            for op, rights in of_line.items()
            for right in rights
        ]
        return list(dict.fromkeys(found))


MOD_10 = ArithmeticTask(
    name="arithmetic",
    modulus=10,
    opening="start",
    # 5 is missing, because it maps every error to 0 or 5 and so removes most of them.
    numbers=({"*": (2, 3, 4, 6, 7, 8, 9)}, {"+": range(1, 10), "-": range(1, 10)}),
)
MOD_7 = ArithmeticTask(
    name="arithmetic-mod-7",
    modulus=7,
    opening="=",
    numbers=(
        {"+": range(1, 7), "*": range(2, 7)},
        {"-": range(1, 7), "*": range(2, 7)},
    ),
)
TASKS = (MOD_10, MOD_7)

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
    """Two lines of computation, each an operator and its right operand: `* 7 + 5`."""

    modulus: int
    first: tuple[str, int]
    second: tuple[str, int]

    @property
    def text(self) -> str:
        return " ".join(f"{op} {right}" for op, right in (self.first, self.second))


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


def compute(left: int, op: str, right: int, modulus: int) -> int:
    return {"*": left * right, "+": left + right, "-": left - right}[op] % modulus


def exact_lines(value: int, operation: Operation) -> tuple[Line, Line]:
    """Returns the two correct lines of one operation."""
    middle = compute(value, *operation.first, operation.modulus)
    result = compute(middle, *operation.second, operation.modulus)
    return Line(value, *operation.first, middle), Line(middle, *operation.second, result)


def chunk_text(lines: Sequence[Line], repair: bool = False) -> str:
    parts = ["fix"] * repair + [line.text for line in lines]
    return tagged(" ; ".join(parts))


def answer_text(value: int) -> str:
    return tagged(f"\\boxed{{ {value} }}")


# --- problems -------------------------------------------------------------------------------------


def task_of(question: str) -> ArithmeticTask | None:
    """Returns the task that a question is of, by its first word, or None."""
    words = question.split()
    return next((task for task in TASKS if words[:1] == [task.opening]), None)


def parse_question(question: str) -> tuple[int, list[Operation]]:
    """Returns the start value and the operations. Raises UserError for another task's question."""
    task = task_of(question)
    try:
        if task is None:
            raise ValueError(question)
        first, *parts = question.removesuffix("?").split(";")
        _, start = first.split()
        operations = [
            Operation(task.modulus, (op, int(right)), (second_op, int(second)))
            for op, right, second_op, second in (part.split() for part in parts)
        ]
        if not operations:
            raise ValueError(question)
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


def problems(
    *, split: str | None, limit: int | None, seed: int, task: ArithmeticTask
) -> list[Problem]:
    """Returns a task's data set, see `tasks.sources`. Raises UserError without split or limit."""
    if limit is None or split is None:
        raise UserError(
            "problems.limit and problems.split must say how many problems of which split to "
            f"generate if problems.source is {task.name!r}"
        )
    return generate_problems(limit, seed, split, task)


def generate_problems(
    count: int, seed: int, split: str, task: ArithmeticTask = MOD_10
) -> list[Problem]:
    """Returns `count` different problems of 3 to 5 operations. A larger count adds problems after
    them. Raises UserError for an unknown split."""
    if split not in SPLITS:
        raise UserError(f"expected a split of {sorted(SPLITS)}, found {split!r}")
    rng = np.random.default_rng((seed, zlib.crc32(split.encode())))

    def part(numbers: dict[str, Sequence[int]]) -> tuple[str, int]:
        op = str(rng.choice(list(numbers)))
        return op, int(rng.choice(numbers[op]))

    questions: dict[str, None] = {}
    while len(questions) < count:
        operations = [
            Operation(task.modulus, part(task.numbers[0]), part(task.numbers[1]))
            for _ in range(rng.integers(3, 6))
        ]
        start = f"{task.opening} {rng.integers(task.modulus)}"
        question = " ; ".join([start, *(operation.text for operation in operations)]) + " ?"
        if zlib.crc32(question.encode()) % 20 in SPLITS[split]:
            questions[question] = None
    return [
        Problem(f"{task.name}/{split}/{i:06d}", question, str(solve(question)), task.name)
        for i, question in enumerate(questions)
    ]


# --- exact truth ----------------------------------------------------------------------------------


@dataclass
class State:
    """What a solution claims so far: the value, and the value one operation ago."""

    operations: list[Operation]
    value: int
    previous_value: int | None = None
    done: int = 0

    def expected(self, chunk: str) -> str | None:
        """Returns the correct chunk of the same kind as `chunk` (an operation, a repair or the
        answer), or None if no chunk of this kind would be correct."""
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
        """Updates the state by what the chunk claims. A chunk that claims nothing changes
        nothing."""
        lines = claimed_lines(chunk)
        if not lines or lines[-1][-1] not in "0123456789":
            return
        result = int(lines[-1][-1])
        if "fix" in chunk.split() and self.previous_value is not None:
            self.value = result
        elif self.done < len(self.operations):
            self.previous_value, self.value, self.done = self.value, result, self.done + 1


def claimed_lines(chunk: str) -> list[list[str]]:
    """Returns the words of the `a op b = c` lines of a chunk."""
    words = " ".join(chunk.replace(CHUNK_OPEN, "").replace(CHUNK_CLOSE, "").split())
    lines = [line.split() for line in words.split(";")]
    return [line for line in lines if len(line) == 5 and line[3] == "="]


def chunk_truth(question: str, chunks: Sequence[str]) -> list[bool]:
    """Returns for every chunk whether it is correct, given what the chunks before it claim."""
    value, operations = parse_question(question)
    state, truth = State(operations, value), []
    for chunk in chunks:
        truth.append(" ".join(chunk.split()) == state.expected(chunk))
        state.advance(chunk)
    return truth


def first_error(question: str, chunks: Sequence[str]) -> int:
    """Returns the index of the first wrong chunk, -1 if all are correct."""
    truth = chunk_truth(question, chunks)
    return truth.index(False) if False in truth else -1


def processbench_item(
    problem: Problem, trajectory_id: str, chunks: Sequence[str], is_correct: bool
) -> ProcessBenchItem:
    """Returns a solution with its exact first error, in ProcessBench's form."""
    return ProcessBenchItem(
        item_id=trajectory_id,
        subset=problem.source,
        question=problem.question,
        steps=tuple(chunks),
        first_error=first_error(problem.question, chunks),
        final_answer_correct=is_correct,
    )


# --- the tiny model -------------------------------------------------------------------------------


def write_model(directory: str | Path) -> None:
    """Writes the files from which a fresh model is made: config.json and the tokenizer's."""
    write_tokenizer(directory)
    (Path(directory) / "config.json").write_text(json.dumps(hf_config()), encoding="utf-8")


def write_tokenizer(directory: str | Path) -> None:
    """Writes a word-level tokenizer.json: words are split at spaces and joined by them."""
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
    """Returns the config.json of the tiny model, a llama of 0.56M parameters."""
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
