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

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stepwiser_jax.config import GenPrmTeacher, RejectionSample, StepwiserTeacher, ThinkPrmTeacher
from stepwiser_jax.data.datasets import load_classifier_examples, load_judge_examples
from stepwiser_jax.data.held_out import drop_held_out, held_out_questions
from stepwiser_jax.data.rationales import RationaleOutcome, judgment_outcome
from stepwiser_jax.distributed import hosts
from stepwiser_jax.distributed.hosts import NO_SHARD, Shard
from stepwiser_jax.distributed.loading import Loaded
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams, StopReason
from stepwiser_jax.judges import thinkprm
from stepwiser_jax.judges.base import Solution
from stepwiser_jax.judges.genprm.form import (
    CODE_OUTPUT,
    FORMS,
    Critique,
    critique_outcome,
    dialogue_of,
    parse_critique,
    parse_turns,
    synthesis_prompt,
)
from stepwiser_jax.judges.genprm.judge import GenPrmCritic, Synthesizer
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
from stepwiser_jax.runs.directory import RunDirectory
from stepwiser_jax.text.prompts import PromptStyle, encode_message, judge_prompt
from stepwiser_jax.text.tokenizer import Tokenizer, completion_text

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
                    chosen.append(to_learn(config, examples, learned))

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
    loaded, engine = session.load(config.judge, config.judge.engine, "judge")
    if isinstance(config.judge, GenPrmTeacher):
        write = CritiqueWriter(config, config.judge, loaded, engine)
        session.measures.append(lambda made: write.teacher.writer.measured)
    else:
        write = TextWriter(config, loaded.tokenizer, engine)
    write.check_lengths(examples)
    return write


# --- one text about an example ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TextForm:
    """A text that is written about an example in one go.

    Attributes:
        prompt: Returns what the writer is asked about an example.
        label: Returns whether what is judged is right.
        read: Takes an example, a text, and whether the text is finished. Returns the text to keep
            and what becomes of it.
        opening: How the answer begins; the writer is given it.
        stop_strings: What ends a text.
    """

    prompt: Callable[[Any], str]
    label: Callable[[Any], bool]
    read: Callable[[Any, str, bool], tuple[str, RationaleOutcome]]
    opening: str = ""
    stop_strings: tuple[str, ...] = ()


def text_form(config: RejectionSample, tokenizer: Tokenizer) -> TextForm:
    """Returns the form of what the judge writes about an example."""
    if isinstance(config.judge, ThinkPrmTeacher):
        return chains(config.judge.prompt_style, tokenizer, config.judge.max_tokens)
    return judgments(style_of(config))


def style_of(config: RejectionSample) -> PromptStyle:
    """Returns the style of prompts, which is not `verdict` here."""
    style = config.judge.prompt_style
    assert style != "verdict"
    return style


def judgments(style: PromptStyle) -> TextForm:
    """Returns the form of StepWiser's judgments of single chunks."""
    return TextForm(
        prompt=lambda e: judge_prompt(e.question, e.history, e.chunk, style),
        label=lambda e: e.is_positive,
        read=lambda e, text, finished: (text, judgment_outcome(text, finished, e.is_positive)),
    )


def chains(style: PromptStyle, tokenizer: Tokenizer, max_tokens: int) -> TextForm:
    """Returns the form of ThinkPRM's chains about solutions."""
    form = thinkprm.FORMS[style]

    def read(example: ClassifierExample, text: str, finished: bool) -> tuple[str, RationaleOutcome]:
        chunks, labels = thinkprm.to_verify(example)
        chain = thinkprm.cut_chain(text, form, len(chunks))
        outcome = thinkprm.chain_outcome(chain, finished, labels, len(chunks), form)
        if outcome is not RationaleOutcome.KEPT:
            return chain, outcome
        chain = thinkprm.clean_chain(chain, form)
        is_long = len(tokenizer.encode(form.whole(chain, labels[-1]))) > max_tokens
        return chain, RationaleOutcome.TOO_LONG if is_long else RationaleOutcome.KEPT

    return TextForm(
        prompt=lambda e: thinkprm.verify_prompt(e.question, thinkprm.to_verify(e)[0], style),
        label=lambda e: thinkprm.to_verify(e)[1][-1],
        read=read,
        opening=form.opening,
        stop_strings=form.stops,
    )


class TextWriter:
    """Writes `samples` texts about each example of a block, with what becomes of them."""

    def __init__(self, config: RejectionSample, tokenizer: Tokenizer, engine: Engine):
        self.config, self.tokenizer, self.engine = config, tokenizer, engine
        self.form = text_form(config, tokenizer)
        self.params = SamplingParams(
            **config.judge.sampling.model_dump(),
            stop_ids=tokenizer.eos_ids,
            stop_strings=self.form.stop_strings,
        )
        self.key = jax.random.key(config.seed)

    def prompt_ids(self, example: Example) -> list[int]:
        opening, style = self.form.opening, style_of(self.config)
        asked = encode_message(self.tokenizer, self.form.prompt(example), style, answer=opening)
        return asked + self.tokenizer.encode(opening)

    def check_lengths(self, examples: Sequence[Example]) -> None:
        for example in examples:
            self.engine.check_length(
                len(self.prompt_ids(example)), self.params.max_new_tokens, example.record_id
            )

    def __call__(self, block: Sequence[Example]) -> list[Rationale]:
        ids_B = rationale_ids(self.config, block)
        completions = self.engine.generate(
            [self.prompt_ids(example) for example in block],
            self.params,
            key=self.key,
            row_ids=[f"rationalize/{rationale_id}" for rationale_id in ids_B],
            group_size=self.config.samples,
        )
        rationales = []
        for p, example in enumerate(block):
            written = []
            for completion in completions[p * self.config.samples :][: self.config.samples]:
                text = completion_text(self.tokenizer, completion.tokens.tolist())
                finished = completion.stop_reason is not StopReason.LENGTH
                written.append(self.form.read(example, text, finished))
            prompt, label = self.form.prompt(example), self.form.label(example)
            rationales += rationales_of(example, prompt, label, written)
        return rationales


# --- a conversation about a solution ------------------------------------------------------------


class CritiqueWriter:
    """Writes `samples` critiques of each solution of a block, with what becomes of them."""

    def __init__(
        self, config: RejectionSample, judge: GenPrmTeacher, loaded: Loaded, engine: Engine
    ):
        """Raises UserError if code is to be run and cannot be confined on this machine."""
        self.config, self.judge = config, judge
        sampling = judge.sampling.model_dump()
        self.params = SamplingParams(**sampling, stop_ids=loaded.tokenizer.eos_ids)
        settings: dict[str, Any] = {
            "name": "rejection-sample",
            "code_rounds": judge.code_rounds,
            "max_new_tokens": judge.sampling.max_new_tokens,
            "key": jax.random.key(config.seed),
        }
        if judge.turn_by_turn:
            settings["prompt_style"] = judge.prompt_style
            self.teacher = GenPrmCritic(loaded, engine, **settings)
        else:
            self.teacher = Synthesizer(loaded, engine, **settings)

    def check_lengths(self, examples: Sequence[ClassifierExample]) -> None:
        self.teacher.check_lengths([solution_of(example) for example in examples])

    def __call__(self, block: Sequence[ClassifierExample]) -> list[Rationale]:
        solutions = [solution_of(example) for example in block]
        suffixes = [f"/{k}" for k in range(self.config.samples)]
        found = self.teacher.critiques(solutions, self.params, suffixes)
        rationales = []
        for example, critiques in zip(block, found, strict=True):
            written = []
            for text, finished in critiques:
                critique = critique_of(self.judge, example, text)
                written.append((text, critique_outcome(critique, finished, example)))
            prompt, label = first_prompt(self.judge, example), all(example.is_positive)
            rationales += rationales_of(example, prompt, label, written)
        return rationales


def first_prompt(judge: GenPrmTeacher, example: ClassifierExample) -> str:
    """Returns the first prompt to the teacher about a solution."""
    if judge.turn_by_turn:
        return FORMS[judge.prompt_style].user_turn(example.question, example.chunks, 0)
    return synthesis_prompt(example.question, example.chunks, code=bool(judge.code_rounds))


def critique_of(judge: GenPrmTeacher, example: ClassifierExample, text: str) -> Critique | None:
    """Returns the critique that a text holds, None if its form is wrong. Without code, a text that
    claims to show what code printed has the wrong form."""
    if not judge.code_rounds and CODE_OUTPUT in text:
        return None
    if judge.turn_by_turn:
        return parse_turns(text, FORMS[judge.prompt_style], len(example.chunks))
    return parse_critique(text, len(example.chunks))


def solution_of(example: ClassifierExample) -> Solution:
    return Solution(example.solution_id, example.question, example.chunks)


# --- what is kept, and what is learned of it ----------------------------------------------------


def rationales_of(
    example: Example,
    prompt: str,
    is_positive: bool,
    written: Sequence[tuple[str, RationaleOutcome]],
) -> list[Rationale]:
    """Returns the records of all samples (text, outcome) of an example; equal texts are kept
    once."""
    rationales, seen = [], set()
    for k, (text, outcome) in enumerate(written):
        if outcome is RationaleOutcome.KEPT and text in seen:
            outcome = RationaleOutcome.REPEATED
        seen.add(text)
        name = f"{example.record_id}/{k}"
        rationales.append(
            Rationale(name, example.problem_id, prompt, text, is_positive, outcome.value)
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
    config: RejectionSample, examples: Sequence[Any], chosen: Sequence[Rationale]
) -> list[SftExample] | list[Dialogue]:
    """Returns what `sft` reads."""
    judge = config.judge
    if not isinstance(judge, GenPrmTeacher):
        return [
            SftExample(r.rationale_id, r.problem_id, r.prompt, learned_text(judge, r))
            for r in chosen
        ]
    example_of = {id_: e for e in examples for id_ in rationale_ids(config, [e])}
    dialogues = []
    for rationale in chosen:
        example = example_of[rationale.rationale_id]
        critique = critique_of(judge, example, rationale.completion)
        assert critique is not None, f"{rationale.rationale_id} was kept"
        form = FORMS[judge.prompt_style]
        dialogues.append(dialogue_of(rationale.rationale_id, example, critique, form))
    return dialogues


def learned_text(judge: StepwiserTeacher | ThinkPrmTeacher, rationale: Rationale) -> str:
    """Returns the completion that `sft` imitates."""
    if not isinstance(judge, ThinkPrmTeacher):
        return rationale.completion
    form = thinkprm.FORMS[judge.prompt_style]
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
