"""Samples judgments of labelled examples and keeps those that agree with the labels, for `sft`.

    labelled chunk -> `samples` judgments -> those whose verdict is the label -> examples

This is the offline judge of StepWiser's ablation (A.1, RS-FT): the same form and labels as in GRPO,
sampled once from the judge that GRPO starts from. Where the paper is silent: every kept judgment of
a chunk is learned, equal texts once; and the larger class of labels is down-sampled again, since a
judge finds one of the two easier (`balance`).

GenPRM (arXiv 2504.00891; `judges/genprm/form.py`):

    labelled solution -> `samples` critiques, their code run on the way -> those that agree with all
                         labels -> dialogues

ThinkPRM (arXiv 2504.16828; `judges/thinkprm.py`):

    labelled solution, or prefix -> `samples` verification chains -> those with a verdict on every
                                    step that agree with the labels up to the first error and are
                                    not too long -> examples

Reads `examples` and the judge that writes. Writes rationales, each with what became of it, and
examples or dialogues from those that are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stepwiser_jax.config import (
    GenPrmTeacher,
    RejectionSample,
    StepwiserTeacher,
    Teacher,
    ThinkPrmTeacher,
)
from stepwiser_jax.data.datasets import load_classifier_examples, load_judge_examples
from stepwiser_jax.data.held_out import drop_held_out, held_out_questions
from stepwiser_jax.data.rationales import RationaleOutcome, judgment_outcome
from stepwiser_jax.distributed import hosts
from stepwiser_jax.distributed.hosts import NO_SHARD, Shard
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.params import StopReason
from stepwiser_jax.judges import thinkprm
from stepwiser_jax.judges.base import Solution
from stepwiser_jax.judges.genprm.form import (
    CODE_OUTPUT,
    Critique,
    GenPrmForm,
    conversation,
    critique_outcome,
    form_of,
    parse_critique,
    parse_turns,
    synthesis_prompt,
)
from stepwiser_jax.judges.genprm.judge import GenPrmCritic, Synthesizer
from stepwiser_jax.judges.writer import Writer
from stepwiser_jax.record_io import read_written
from stepwiser_jax.records import (
    ClassifierExample,
    Dialogue,
    JudgeExample,
    Rationale,
    SftExample,
    natural_key,
)
from stepwiser_jax.rl.examples import balanced
from stepwiser_jax.runs.blocks import Session, Work, run_blocks
from stepwiser_jax.runs.checkpoint_paths import load_tokenizer_of
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.text.prompts import JudgePromptStyle, encode_message, judge_prompt
from stepwiser_jax.text.templates import Prompts
from stepwiser_jax.text.tokenizer import Tokenizer

Example = JudgeExample | ClassifierExample


def run(config: RejectionSample, run_dir: str | Path, shard: Shard = NO_SHARD) -> dict[str, Any]:
    """Samples judgments of labelled examples, block after block, and chooses what is learned."""
    learned_type = Dialogue if isinstance(config.judge, GenPrmTeacher) else SftExample

    def prepare() -> Work[Any, Rationale]:
        examples, dropped = load_examples(config)

        def choose_what_is_learned(directory: RunDirectory) -> None:
            rationales, chosen = directory.writer(Rationale), directory.writer(learned_type)
            hosts.barrier("rejection-sample: rationales are written")
            if shard == NO_SHARD:
                # Every process chooses, so that all of them raise the same UserError.
                learned = choose(config, rationales.read())
                if hosts.is_primary():
                    prompts = load_tokenizer_of(config.judge.path, **config.judge.asked).prompts
                    chosen.append(to_learn(config, examples, learned, prompts))

        def summary(rationales: Sequence[Rationale]) -> dict[str, Any]:
            chosen = read_written(Path(run_dir), learned_type)
            counts = {"examples": len(examples), "dropped": dropped}
            return counts | summarize(rationales) | {"chosen": len(chosen)}

        return Work(
            items=examples,
            record_type=Rationale,
            ids_of=lambda block: rationale_ids(config, block),
            begin=lambda session: begin(config, session, examples),
            summarize=summary,
            unit="rationale",
            complete=choose_what_is_learned,
        )

    return run_blocks("rejection-sample", config, run_dir, shard, prepare)


def load_examples(config: RejectionSample) -> tuple[list[Any], dict[str, int]]:
    """Returns the examples of no excluded problem, and counts of what was left out."""
    dropped: Counter[str] = Counter()
    data = config.examples
    load = load_classifier_examples if config.of_solutions else load_judge_examples
    examples: list[Any] = load(data.source, on_malformed=data.on_malformed, dropped=dropped)
    if not examples:
        raise UserError(f"expected labelled examples in {data.source}, found none")
    examples = drop_held_out(examples, held_out_questions(data.exclude), dropped)
    return examples[: data.limit], dict(dropped)


def rationale_ids(config: RejectionSample, block: Sequence[Example]) -> list[str]:
    """Returns the ids of a block's rationales, those of an example one after another."""
    return [f"{example.record_id}/{k}" for example in block for k in range(config.samples)]


def begin(
    config: RejectionSample, session: Session, examples: Sequence[Any]
) -> Callable[[Sequence[Any]], list[Rationale]]:
    """Returns the function that writes the rationales of a block. Raises UserError for an example
    that is too long."""
    judge = config.judge
    loaded, engine = session.load(judge, judge.engine, "judge")
    name = "rejection-sample" if isinstance(judge, GenPrmTeacher) else "rationalize"
    writer = Writer(loaded, engine, judge.sampling, judge.prompt_style, config.seed, name)
    task = task_of(judge, loaded.tokenizer)
    suffixes = [f"/{k}" for k in range(config.samples)]
    if not isinstance(judge, GenPrmTeacher):
        for example in examples:
            writer.check_length(prompt_ids(writer, task, example), example.record_id)
        return lambda block: rationales_of(task, block, write_texts(writer, task, block, suffixes))
    make = GenPrmCritic if judge.turn_by_turn else Synthesizer
    teacher = make(writer, code_rounds=judge.code_rounds)
    session.measures.append(lambda made: teacher.turns.measured)
    teacher.check_lengths(solutions_of(examples))
    return lambda block: rationales_of(
        task, block, teacher.critiques(solutions_of(block), suffixes)
    )


def solutions_of(examples: Sequence[ClassifierExample]) -> list[Solution]:
    """Returns what a teacher of whole solutions writes about."""
    return [Solution(e.solution_id, e.question, e.chunks) for e in examples]


# --- what is written about an example -----------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What is written about an example, and what becomes of it.

    Attributes:
        prompt: Returns the first message to the writer about an example.
        label: Returns whether what is judged is right.
        read: Takes an example, a text, and whether the text is finished. Returns the text to keep
            and what becomes of it.
        opening: How a text begins; the writer is given it.
        stop_strings: What ends a text.
    """

    prompt: Callable[[Any], str]
    label: Callable[[Any], bool]
    read: Callable[[Any, str, bool], tuple[str, RationaleOutcome]]
    opening: str = ""
    stop_strings: tuple[str, ...] = ()


def task_of(judge: Teacher, tokenizer: Tokenizer) -> Task:
    """Returns what this judge writes."""
    if isinstance(judge, GenPrmTeacher):
        return critiques(judge, tokenizer.prompts)
    if isinstance(judge, ThinkPrmTeacher):
        return chains(judge, tokenizer)
    return judgments(judge.prompt_style, tokenizer.prompts)


def judgments(style: JudgePromptStyle, prompts: Prompts) -> Task:
    """Returns the task of StepWiser's judge: a judgment of a single chunk."""
    return Task(
        prompt=lambda e: judge_prompt(e.question, e.history, e.chunk, style, prompts),
        label=lambda e: e.is_positive,
        read=lambda e, text, finished: (text, judgment_outcome(text, finished, e.is_positive)),
    )


def chains(judge: ThinkPrmTeacher, tokenizer: Tokenizer) -> Task:
    """Returns the task of ThinkPRM: a chain about a solution, of at most `max_tokens` tokens."""
    style, prompts = judge.prompt_style, tokenizer.prompts
    form = thinkprm.form_of(style, prompts)

    def prompt(example: ClassifierExample) -> str:
        chunks, _ = thinkprm.to_verify(example)
        return thinkprm.verify_prompt(example.question, chunks, style, prompts)

    def read(example: ClassifierExample, text: str, finished: bool) -> tuple[str, RationaleOutcome]:
        chunks, labels = thinkprm.to_verify(example)
        chain = thinkprm.cut_chain(text, form, len(chunks))
        outcome = thinkprm.chain_outcome(chain, finished, labels, len(chunks), form)
        if outcome is RationaleOutcome.KEPT:
            chain = thinkprm.clean_chain(chain, form)
            if len(tokenizer.encode(form.whole(chain, labels[-1]))) > judge.max_tokens:
                outcome = RationaleOutcome.TOO_LONG
        return chain, outcome

    return Task(prompt, lambda e: thinkprm.to_verify(e)[1][-1], read, form.opening, form.stops)


def critiques(judge: GenPrmTeacher, prompts: Prompts) -> Task:
    """Returns the task of GenPRM: a critique of a solution. If it is written turn by turn, the
    first message is about the first paragraph."""
    form = form_of(judge.prompt_style, prompts)

    def prompt(example: ClassifierExample) -> str:
        if judge.turn_by_turn:
            return form.user_turn(example.question, example.chunks, 0)
        code = bool(judge.code_rounds)
        return synthesis_prompt(example.question, example.chunks, code=code, prompts=prompts)

    def read(example: ClassifierExample, text: str, finished: bool) -> tuple[str, RationaleOutcome]:
        return text, critique_outcome(critique_of(judge, example, text, form), finished, example)

    return Task(prompt, lambda e: all(e.is_positive), read)


def critique_of(
    judge: GenPrmTeacher, example: ClassifierExample, text: str, form: GenPrmForm
) -> Critique | None:
    """Returns the critique that a text holds, None if its form is wrong. Without code, a text that
    claims to show what code printed has the wrong form."""
    if not judge.code_rounds and CODE_OUTPUT in text:
        return None
    if judge.turn_by_turn:
        return parse_turns(text, form, len(example.chunks))
    return parse_critique(text, len(example.chunks), form)


def prompt_ids(writer: Writer, task: Task, example: Example) -> list[int]:
    """Returns the prompt about an example, with the opening of the answer."""
    style, opening = writer.prompt_style, task.opening
    asked = encode_message(writer.tokenizer, task.prompt(example), style, answer=opening)
    return asked + writer.tokenizer.encode(opening)


def write_texts(
    writer: Writer, task: Task, examples: Sequence[Example], suffixes: Sequence[str]
) -> list[list[tuple[str, bool]]]:
    """Returns (text, whether the writer ended it), [example][suffix]."""
    params = replace(writer.params(), stop_strings=task.stop_strings)
    prompts = [prompt_ids(writer, task, example) for example in examples]
    written = writer.write([e.record_id for e in examples], prompts, suffixes, params)
    return [
        [(text, completion.stop_reason is not StopReason.LENGTH) for text, completion in of_one]
        for of_one in written
    ]


# --- what is kept, and what is learned of it ----------------------------------------------------


def rationales_of(
    task: Task, block: Sequence[Example], written: Sequence[Sequence[tuple[str, bool]]]
) -> list[Rationale]:
    """Returns the records of what was `written` about each example: texts, and whether each is
    finished. Of equal texts one is kept."""
    rationales = []
    for example, texts in zip(block, written, strict=True):
        prompt, label, seen = task.prompt(example), task.label(example), set()
        for k, (text, finished) in enumerate(texts):
            kept, outcome = task.read(example, text, finished)
            if outcome is RationaleOutcome.KEPT and kept in seen:
                outcome = RationaleOutcome.REPEATED
            seen.add(kept)
            name = f"{example.record_id}/{k}"
            rationales.append(
                Rationale(name, example.problem_id, prompt, kept, label, outcome.value)
            )
    return rationales


def choose(config: RejectionSample, rationales: Sequence[Rationale]) -> list[Rationale]:
    """Returns the rationales to learn, in id order, so that draws do not depend on which process
    wrote which part. Raises UserError if there are none."""
    ordered = sorted(rationales, key=lambda r: natural_key(r.rationale_id))
    kept = [r for r in ordered if r.outcome == RationaleOutcome.KEPT.value]
    chosen = balanced(kept, config.seed) if config.balance else kept
    if not chosen:
        found = Counter(rationale.is_positive for rationale in kept)
        raise UserError(
            f"nothing is left to learn of {len(rationales)} rationales: kept were {found[True]} of "
            f"positive and {found[False]} of negative labels. Set balance to false and go on "
            "from them in the same run directory; or in a new one sample more, or let a stronger "
            "judge write"
        )
    if config.max_examples is not None and config.max_examples < len(chosen):
        rng = np.random.default_rng((config.seed, 1))
        drawn = rng.choice(len(chosen), config.max_examples, replace=False)
        chosen = [chosen[i] for i in sorted(drawn)]
    return chosen


def to_learn(
    config: RejectionSample,
    examples: Sequence[Any],
    chosen: Sequence[Rationale],
    prompts: Prompts,
) -> list[SftExample] | list[Dialogue]:
    """Returns what `sft` reads."""
    judge = config.judge
    if not isinstance(judge, GenPrmTeacher):
        return [
            SftExample(r.rationale_id, r.problem_id, r.prompt, learned_text(judge, r, prompts))
            for r in chosen
        ]
    form = form_of(judge.prompt_style, prompts)
    example_of = {id_: e for e in examples for id_ in rationale_ids(config, [e])}
    dialogues = []
    for rationale in chosen:
        example = example_of[rationale.rationale_id]
        critique = critique_of(judge, example, rationale.completion, form)
        assert critique is not None, f"{rationale.rationale_id} was kept"
        said = conversation(example.question, example.chunks, critique.turns, form)
        dialogues.append(Dialogue(rationale.rationale_id, example.problem_id, *said))
    return dialogues


def learned_text(
    judge: StepwiserTeacher | ThinkPrmTeacher, rationale: Rationale, prompts: Prompts
) -> str:
    """Returns the completion that `sft` imitates."""
    if not isinstance(judge, ThinkPrmTeacher):
        return rationale.completion
    form = thinkprm.form_of(judge.prompt_style, prompts)
    return form.whole(rationale.completion, rationale.is_positive)


def summarize(rationales: Sequence[Rationale]) -> dict[str, Any]:
    """Returns counts of rationales by what became of them, and the share of positive labels among
    those that were kept."""
    outcomes = Counter({outcome.value: 0 for outcome in RationaleOutcome})
    outcomes.update(rationale.outcome for rationale in rationales)
    kept = [r.is_positive for r in rationales if r.outcome == RationaleOutcome.KEPT.value]
    return {
        "rationales": dict(outcomes),
        "kept_positive_share": sum(kept) / len(kept) if kept else 0.0,
    }
