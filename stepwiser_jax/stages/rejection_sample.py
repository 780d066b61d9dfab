"""Judgments to learn from: written by a model, kept where they agree with the labels.

    labelled chunk -> `samples` judgments -> those whose verdict is the label -> examples for `sft`

This is the offline judge of StepWiser's ablation (A.1, RS-FT): the same form and the same labels as
in GRPO, sampled once from the judge that GRPO starts from.

Where the paper is silent: every kept judgment of a chunk is learned, those of equal text once; the
larger class of labels is down-sampled again, since a judge finds one of them easier (`balance`).

With `genprm`, critiques of whole solutions (arXiv 2504.00891; `judges/genprm_form.py`):

    labelled solution -> `samples` critiques, their code run on the way -> those that agree with all
                                                                      labels -> dialogues for `sft`

With `thinkprm`, verification chains about whole solutions, or prefixes (arXiv 2504.16828;
`judges/thinkprm_form.py`):

    labelled solution -> `samples` chains -> those with a verdict on every step, that agree with the
                         labels up to the first error, and are not too long -> examples for `sft`

Reads `examples` and the judge that writes. Writes rationales, all of them with what became of them,
and of those that are kept the examples, or the dialogues.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stepwiser_jax.config import RejectionSample
from stepwiser_jax.data.datasets import load_classifier_examples, load_judge_examples
from stepwiser_jax.data.held_out import drop_held_out, held_out_questions
from stepwiser_jax.data.rationales import Outcome, judgment_outcome
from stepwiser_jax.distributed import hosts
from stepwiser_jax.distributed.hosts import NO_SHARD, Shard
from stepwiser_jax.distributed.loading import Loaded, load_for_decoding
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.inference.engine import Engine
from stepwiser_jax.inference.params import SamplingParams, StopReason
from stepwiser_jax.judges import thinkprm_form
from stepwiser_jax.judges.genprm import GenPrmJudge, Synthesizer
from stepwiser_jax.judges.genprm_form import (
    CODE_OUTPUT,
    FORMS,
    Critique,
    critique_outcome,
    dialogue_of,
    parse_critique,
    parse_turns,
    synthesis_prompt,
)
from stepwiser_jax.judges.stepwiser import Solution
from stepwiser_jax.records import (
    ClassifierExample,
    Dialogue,
    JudgeExample,
    Rationale,
    SftExample,
    natural_key,
)
from stepwiser_jax.rl.labels import balanced
from stepwiser_jax.runs.directory import RunDirectory, blocks, per_item
from stepwiser_jax.text.prompts import PromptStyle, encode_message, judge_prompt
from stepwiser_jax.text.tokenizer import Tokenizer, completion_text

Example = JudgeExample | ClassifierExample


def run(config: RejectionSample, run_dir: str | Path, shard: Shard = NO_SHARD) -> dict[str, Any]:
    """Write block after block; a restarted run repeats the block it was killed in."""
    directory = RunDirectory(run_dir, "rejection-sample", config, shard)
    if directory.finished:
        return directory.summary()
    directory.begin()
    examples, dropped = load_examples(config)
    work = blocks(examples, config.examples_per_block)
    work = directory.pending(work, Rationale, lambda block: rationale_ids(config, block))
    measured = write_blocks(config, directory, examples, work) if work else {}
    writer = directory.writer(Rationale)
    chosen = directory.writer(SftExample if config.genprm is None else Dialogue)
    hosts.barrier("rationalize: rationales are written")
    if shard == NO_SHARD:
        learned = choose(config, writer.read())  # by all: every process must refuse what one would
        if hosts.is_primary():
            chosen.append(to_learn(config, examples, learned))
    counts = {"examples": len(examples), "dropped": dropped}
    return directory.finish(
        lambda: counts | summarize(writer.read()) | {"chosen": len(chosen.read())} | measured
    )


def load_examples(config: RejectionSample) -> tuple[list[Any], dict[str, int]]:
    """Examples of no excluded problem, and counts of what was left out."""
    dropped: Counter[str] = Counter()
    load = load_classifier_examples if config.of_solutions else load_judge_examples
    examples: list[Any] = load(config.examples, on_malformed=config.on_malformed, dropped=dropped)
    if not examples:
        raise UserError(f"expected labelled examples in {config.examples}, found none")
    examples = drop_held_out(examples, held_out_questions(config.exclude), dropped)
    return examples[: config.limit], dict(dropped)


def rationale_ids(config: RejectionSample, block: Sequence[Example]) -> list[str]:
    return [f"{example.record_id}/{k}" for example in block for k in range(config.samples)]


def write_blocks(
    config: RejectionSample,
    directory: RunDirectory,
    examples: Sequence[Any],
    work: Sequence[Sequence[Any]],
) -> dict[str, Any]:
    """Rationales of these blocks, written; returns what was measured. Checks all examples first:
    every worker must refuse what one would."""
    mesh = make_mesh(**config.mesh.model_dump(), devices=jax.local_devices())
    loaded = load_for_decoding(
        **config.judge.model_dump(), weights=config.engine.weights, mesh=mesh, seed=config.seed
    )
    engine = Engine(loaded.model, loaded.tokenizer, mesh=mesh, **config.engine.model_dump())
    if config.genprm is None:
        write = TextWriter(config, loaded.tokenizer, engine)
    else:
        write = CritiqueWriter(config, loaded, engine)
    write.check_lengths(examples)
    seconds, written = directory.write_blocks(work, Rationale, write)
    return {
        "seconds_per_rationale": per_item(seconds, written),
        "compiled": engine.compiled_shapes,
    } | (write.teacher.writer.measured if isinstance(write, CritiqueWriter) else {})


# --- one text about an example ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TextForm:
    """What is written about an example in one go, as functions of the example: what the writer is
    asked, and given as the `opening` of its answer; whether what it judges is right (`label`); and
    what is kept of a text, finished or not, with what becomes of it (`read`)."""

    prompt: Callable[[Any], str]
    label: Callable[[Any], bool]
    read: Callable[[Any, str, bool], tuple[str, Outcome]]
    opening: str = ""
    stop_strings: tuple[str, ...] = ()


def text_form(config: RejectionSample, tokenizer: Tokenizer) -> TextForm:
    if config.thinkprm is not None:
        return chains(config.prompt_style, tokenizer, config.thinkprm.max_tokens)
    return judgments(config.prompt_style)


def judgments(style: PromptStyle) -> TextForm:
    """StepWiser's, of single chunks."""
    return TextForm(
        prompt=lambda e: judge_prompt(e.question, e.history, e.chunk, style),
        label=lambda e: e.is_positive,
        read=lambda e, text, finished: (text, judgment_outcome(text, finished, e.is_positive)),
    )


def chains(style: PromptStyle, tokenizer: Tokenizer, max_tokens: int) -> TextForm:
    """ThinkPRM's, of solutions."""
    form = thinkprm_form.FORMS[style]

    def read(example: ClassifierExample, text: str, finished: bool) -> tuple[str, Outcome]:
        chunks, labels = thinkprm_form.to_verify(example)
        chain = thinkprm_form.cut_chain(text, form, len(chunks))
        outcome = thinkprm_form.chain_outcome(chain, finished, labels, len(chunks), form)
        if outcome is not Outcome.KEPT:
            return chain, outcome
        chain = thinkprm_form.cleaned(chain, form)
        is_long = len(tokenizer.encode(form.whole(chain, labels[-1]))) > max_tokens
        return chain, Outcome.TOO_LONG if is_long else Outcome.KEPT

    return TextForm(
        prompt=lambda e: thinkprm_form.verify_prompt(
            e.question, thinkprm_form.to_verify(e)[0], style
        ),
        label=lambda e: thinkprm_form.to_verify(e)[1][-1],
        read=read,
        opening=form.opening,
        stop_strings=form.stops,
    )


class TextWriter:
    """Examples of one block -> `samples` texts about each, with what becomes of them."""

    def __init__(self, config: RejectionSample, tokenizer: Tokenizer, engine: Engine):
        self.config, self.tokenizer, self.engine = config, tokenizer, engine
        self.form = text_form(config, tokenizer)
        self.params = SamplingParams(
            **config.sampling.model_dump(),
            stop_ids=tokenizer.eos_ids,
            stop_strings=self.form.stop_strings,
        )
        self.key = jax.random.key(config.seed)

    def prompt_ids(self, example: Example) -> list[int]:
        opening, style = self.form.opening, self.config.prompt_style
        asked = encode_message(self.tokenizer, self.form.prompt(example), style, answer=opening)
        return asked + self.tokenizer.encode(opening)

    def check_lengths(self, examples: Sequence[Example]) -> None:
        for example in examples:
            self.engine.check_length(
                len(self.prompt_ids(example)), self.params.max_new_tokens, example.record_id
            )

    def __call__(self, block: Sequence[Example]) -> list[Rationale]:
        ids_B = rationale_ids(self.config, block)
        output = self.engine.generate(
            [self.prompt_ids(example) for example in block],
            self.params,
            key=self.key,
            row_ids=[f"rationalize/{rationale_id}" for rationale_id in ids_B],
            group_size=self.config.samples,
        )
        rationales = []
        for p, example in enumerate(block):
            written = []
            for b in range(p * self.config.samples, (p + 1) * self.config.samples):
                text = completion_text(self.tokenizer, output.ids(b))
                finished = output.stop_reason_B[b] != StopReason.LENGTH
                written.append(self.form.read(example, text, finished))
            prompt, label = self.form.prompt(example), self.form.label(example)
            rationales += rationales_of(example, prompt, label, written)
        return rationales


# --- a conversation about a solution ------------------------------------------------------------


class CritiqueWriter:
    """Solutions of one block -> `samples` critiques of each, with what becomes of them."""

    def __init__(self, config: RejectionSample, loaded: Loaded, engine: Engine):
        """Raises UserError where code cannot be confined on this machine."""
        assert config.genprm is not None
        self.config = config
        sampling = config.sampling.model_dump()
        self.params = SamplingParams(**sampling, stop_ids=loaded.tokenizer.eos_ids)
        settings: dict[str, Any] = {
            "name": "rejection-sample",
            "genprm": config.genprm,
            "max_new_tokens": config.sampling.max_new_tokens,
            "key": jax.random.key(config.seed),
        }
        if config.genprm.turn_by_turn:
            settings["prompt_style"] = config.prompt_style
            self.teacher = GenPrmJudge(loaded, engine, **settings)
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
                critique = critique_of(self.config, example, text)
                written.append((text, critique_outcome(critique, finished, example)))
            prompt, label = asked(self.config, example), all(example.is_positive)
            rationales += rationales_of(example, prompt, label, written)
        return rationales


def asked(config: RejectionSample, example: ClassifierExample) -> str:
    """What the teacher is asked about a solution, or asked first."""
    assert config.genprm is not None
    if config.genprm.turn_by_turn:
        return FORMS[config.prompt_style].user_turn(example.question, example.chunks, 0)
    return synthesis_prompt(example.question, example.chunks, code=config.genprm.code)


def critique_of(config: RejectionSample, example: ClassifierExample, text: str) -> Critique | None:
    """None also for one that tells what its code printed where none is run."""
    assert config.genprm is not None
    if not config.genprm.code and CODE_OUTPUT in text:
        return None
    if config.genprm.turn_by_turn:
        return parse_turns(text, FORMS[config.prompt_style], len(example.chunks))
    return parse_critique(text, len(example.chunks))


def solution_of(example: ClassifierExample) -> Solution:
    return Solution(example.solution_id, example.question, example.chunks)


# --- what is kept, and what is learned of it ----------------------------------------------------


def rationales_of(
    example: Example, prompt: str, is_positive: bool, written: Sequence[tuple[str, Outcome]]
) -> list[Rationale]:
    """Records of (text, outcome) of all samples of one example; equal texts are kept once."""
    rationales, seen = [], set()
    for k, (text, outcome) in enumerate(written):
        if outcome is Outcome.KEPT and text in seen:
            outcome = Outcome.REPEATED
        seen.add(text)
        name = f"{example.record_id}/{k}"
        rationales.append(
            Rationale(name, example.problem_id, prompt, text, is_positive, outcome.value)
        )
    return rationales


def choose(config: RejectionSample, rationales: Sequence[Rationale]) -> list[Rationale]:
    """Those that are learned, in id order: draws must not depend on who wrote which part. Raises
    UserError where there are none."""
    ordered = sorted(rationales, key=lambda r: natural_key(r.rationale_id))
    kept = [r for r in ordered if r.outcome == Outcome.KEPT.value]
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
    """What `sft` reads."""
    if config.genprm is None:
        return [
            SftExample(r.rationale_id, r.problem_id, r.prompt, learned_text(config, r))
            for r in chosen
        ]
    example_of = {id_: e for e in examples for id_ in rationale_ids(config, [e])}
    dialogues = []
    for rationale in chosen:
        example = example_of[rationale.rationale_id]
        critique = critique_of(config, example, rationale.completion)
        assert critique is not None, f"{rationale.rationale_id} was kept"
        form = FORMS[config.prompt_style]
        dialogues.append(dialogue_of(rationale.rationale_id, example, critique, form))
    return dialogues


def learned_text(config: RejectionSample, rationale: Rationale) -> str:
    """The completion that `sft` imitates."""
    if config.thinkprm is None:
        return rationale.completion
    return thinkprm_form.FORMS[config.prompt_style].whole(
        rationale.completion, rationale.is_positive
    )


def summarize(rationales: Sequence[Rationale]) -> dict[str, Any]:
    """Rationales by what became of them, and the kept ones' share of positive labels."""
    outcomes = Counter({outcome.value: 0 for outcome in Outcome})
    outcomes.update(rationale.outcome for rationale in rationales)
    kept = [r.is_positive for r in rationales if r.outcome == Outcome.KEPT.value]
    return {
        "rationales": dict(outcomes),
        "kept_positive_share": sum(kept) / len(kept) if kept else 0.0,
    }
