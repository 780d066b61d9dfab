"""Defines the judges that are compared: one row for every way to train a judge.

Every row of `JUDGES` has one learning rate: its first guess times the best factor, which is
searched for by `stepwiser reproduce --tune` and stands in `CHOSEN`. Rows of `CONTROLS` have the
rate of another row. The second task, which no tuning has seen, has the rows of `CORE` only, at the
same rates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from stepwiser_jax.commands.quickstart import (
    JUDGE,
    JUDGE_ENGINE,
    fine_tuning,
    judge_training,
    optimizer,
)
from stepwiser_jax.commands.reproduce.controls import drawn, truth_examples, with_shuffled_labels
from stepwiser_jax.commands.reproduce.seed_runs import (
    EXAMPLES,
    SeedRuns,
    Settings,
    Stage,
    changed,
    shared_stages,
)
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import JudgeExample
from stepwiser_jax.tasks.arithmetic import MOD_10

CHAIN = 416
"""Tokens of the longest conversation, or chain, about a whole solution, prompt included."""

CLASSIFIER = {"kind": "classifier", "prompt_style": "bare", "max_length": 320}


def label_sets(runs: SeedRuns) -> dict[str, list[Stage]]:
    """Returns the stages that make each set of labels from what `base` makes, by the set's name."""
    label = shared_stages(runs)["labels"][1]
    absolute = runs.stage("labels_absolute", "label", changed(label, rule="abs_q"))

    def examples(name: str) -> list[JudgeExample]:
        return read_records(runs.at(name), JudgeExample)

    def as_many_as_absolute() -> list[JudgeExample]:
        return drawn(examples("labels"), len(examples("labels_absolute")), runs.seed)

    def printed(**changes: Any) -> Settings:
        """Returns the settings of labels as the paper prints them: no chunk is left out."""
        return changed(label, dead_prefix="negative", min_prefix_value=0.0, **changes)

    def shuffled() -> list[JudgeExample]:
        return with_shuffled_labels(examples("labels"), runs.seed)

    return {
        "labels": [],
        "labels_shuffled.jsonl": [("labels_shuffled.jsonl", EXAMPLES, shuffled)],
        "labels_absolute": [absolute],
        "labels_as_many.jsonl": [
            absolute,
            ("labels_as_many.jsonl", EXAMPLES, as_many_as_absolute),
        ],
        "labels_printed": [runs.stage("labels_printed", "label", printed())],
        "labels_printed_absolute": [
            runs.stage("labels_printed_absolute", "label", printed(rule="abs_q"))
        ],
        "labels_unbalanced": [
            runs.stage("labels_unbalanced", "label", changed(label, balance=False))
        ],
    }


# --- rows ---------------------------------------------------------------------------------------


def scored(runs: SeedRuns, name: str, judge: Settings) -> list[Stage]:
    """Returns the evaluations of a trained judge: one on solutions of the development split, on
    which its threshold is chosen, and one on the held-out solutions."""

    def on(solutions: str) -> Settings:
        benchmark = {"source": runs.at(solutions)}
        return {"judge": judge | {"path": runs.at(name)}, "benchmark": benchmark, "block_size": 256}

    # `searches` needs a classifier's threshold; `measure` chooses that of every judge alike.
    chosen_on = {"threshold_subset": runs.task.name} if judge is CLASSIFIER else {}
    return [
        runs.stage(f"{name}_dev", "evaluate", on("heldout_dev") | chosen_on),
        runs.stage(f"{name}_score", "evaluate", on("heldout")),
    ]


def by_grpo(
    runs: SeedRuns,
    name: str,
    rate: float,
    labels: str = "labels",
    cold_start: str = "cold_start",
    **changes: Any,
) -> list[Stage]:
    tree = changed(
        judge_training(runs.run_dir, runs.seed)[1][2],
        model={"path": runs.at(cold_start)},
        examples={"source": runs.at(labels)},
        iterations=runs.steps(60),
        training__optimizer__learning_rate=rate,
        **changes,
    )
    return [
        *label_sets(runs)[labels],
        runs.stage(name, "train-judge", tree),
        *scored(runs, name, JUDGE),
    ]


STEPS = 150
"""Optimizer steps of a fine-tuning on judgments that were kept."""


def learned(runs: SeedRuns, name: str, rate: float, start: str, source: str) -> Stage:
    """Returns the fine-tuning of the model that wrote judgments on those that were kept."""
    tree = changed(
        fine_tuning(source, 1, runs.seed, runs.steps(STEPS)),
        model={"path": runs.at(start)},
        examples={"source": runs.at(source)},
        max_length=CHAIN,
        training__optimizer=optimizer(rate, 10, 0.1),
    )
    return runs.stage(name, "sft", tree)


def offline(runs: SeedRuns, name: str, rate: float) -> list[Stage]:
    """Returns the stages of rejection-sampled fine-tuning (StepWiser A.1, RS-FT)."""
    rationales = {
        "judge": JUDGE | {"path": runs.at("cold_start")},
        "examples": {"source": runs.at("labels")},
        "samples": 8,
        "block_size": 256,
    }
    return [
        runs.stage("rationales", "rejection-sample", rationales),
        learned(runs, name, rate, "cold_start", "rationales"),
        *scored(runs, name, JUDGE),
    ]


def classifier_training(start: str, source: str, rate: float, **length: int) -> Settings:
    return {
        "model": {"path": start},
        "examples": {"source": source},
        "batch_size": 8,
        "max_length": 320,
        "training": {"optimizer": optimizer(rate, 30, 0.1)},
        **length,
    }


def by_classifier(runs: SeedRuns, name: str, rate: float, start: str = "cold_start") -> list[Stage]:
    """Returns the stages of a classifier that learns the same labels from a trained model on."""
    tree = classifier_training(runs.at(start), runs.at("labels"), rate, steps=runs.steps(160))
    return [runs.stage(name, "train-classifier", tree), *scored(runs, name, CLASSIFIER)]


def classifier_start(runs: SeedRuns) -> list[Stage]:
    """Returns the stages that give a classifier the demonstrations of the judge's cold start in its
    own form too: from the cold start on it learns the exact truth of the same chunks."""
    count = judge_training(runs.run_dir, runs.seed)[0][2]["examples"]["limit"]
    file = "demonstrations_truth.jsonl"
    start = classifier_training(runs.at("cold_start"), runs.at(file), 1e-3, epochs=1)
    return [
        (file, EXAMPLES, lambda: truth_examples(count, runs.seed, runs.task)),
        runs.stage("classifier_start", "train-classifier", start),
        *scored(runs, "classifier_start", CLASSIFIER),
    ]


def by_classifier_of_demonstrations(runs: SeedRuns, name: str, rate: float) -> list[Stage]:
    """Returns the stages of a classifier that learns the labels after the demonstrations."""
    return [*classifier_start(runs), *by_classifier(runs, name, rate, "classifier_start")]


@dataclass(frozen=True)
class PrmForm:
    """A form of generative reward model: the steps that its start takes to learn it, how it is
    asked for rationales, how it judges, and the tokens of a turn or a chain."""

    start_steps: int
    asked_for: Settings
    judges_by: Settings
    max_new_tokens: int


PRM_FORMS = {
    # The task has no words for code.
    "genprm": PrmForm(300, {"code_rounds": 0, "turn_by_turn": True}, {"code_rounds": 0}, 32),
    # A chain must find what it verifies in the solution, while a turn is shown it. After 300
    # steps it looks at the wrong places (dev split: F1 19 in place of 67).
    "thinkprm": PrmForm(900, {}, {}, CHAIN - 160),
}
PRM_ENGINE = JUDGE_ENGINE | {"buckets": [160, 288, CHAIN]}
SAMPLES = 2
"""Rationales of each labelled solution."""


def prm_start(runs: SeedRuns, form: str) -> list[Stage]:
    """Returns the cold start, taught a form by the same imperfect teacher, without Monte Carlo
    labels."""
    steps = PRM_FORMS[form].start_steps
    tree = changed(
        fine_tuning(f"arithmetic-{form}", 8 * steps, runs.seed, steps),
        model={"path": runs.at("cold_start")},
        max_length=CHAIN,
    )
    return [runs.stage(f"{form}_start", "sft", tree), *prm_scored(runs, form, f"{form}_start")]


def prm_scored(runs: SeedRuns, form: str, name: str) -> list[Stage]:
    written = {"sampling": {"max_new_tokens": PRM_FORMS[form].max_new_tokens}}
    judge = {"kind": form, "prompt_style": "bare", "engine": PRM_ENGINE}
    return scored(runs, name, judge | written | PRM_FORMS[form].judges_by)


def by_prm(form: str, runs: SeedRuns, name: str, rate: float) -> list[Stage]:
    """Returns the stages that sample from its start, keep what fits the labels, and learn it."""
    rationales, start = f"{form}_rationales", f"{form}_start"

    def asked() -> Settings:
        return {
            "judge": {
                "kind": form,
                "path": runs.at(start),
                "prompt_style": "bare",
                **PRM_FORMS[form].asked_for,
                "sampling": {"max_new_tokens": PRM_FORMS[form].max_new_tokens},
                "engine": PRM_ENGINE,
            },
            "examples": {"source": runs.at("labels")},
            "samples": SAMPLES,
            "block_size": 256,
        }

    return [
        *prm_start(runs, form),
        runs.stage(rationales, "rejection-sample", asked),
        learned(runs, name, rate, start, rationales),
        *prm_scored(runs, form, name),
    ]


Row = Callable[[SeedRuns, str, float], list[Stage]]
JUDGES: dict[str, tuple[Row, float]] = {
    "stepwiser": (by_grpo, 2e-4),
    "absolute_labels": (partial(by_grpo, labels="labels_absolute"), 2e-4),
    "no_reasoning": (
        partial(by_grpo, cold_start="cold_start_verdicts", reward_args={"format_penalty": 1.0}),
        2e-4,
    ),
    "unbalanced": (partial(by_grpo, labels="labels_unbalanced"), 2e-4),
    "offline": (offline, 6e-4),
    "classifier": (by_classifier, 1e-3),
    "classifier_policy": (partial(by_classifier, start="policy"), 1e-3),
    "classifier_demonstrations": (by_classifier_of_demonstrations, 1e-3),
    "genprm_form": (partial(by_prm, "genprm"), 3e-4),
    "thinkprm_form": (partial(by_prm, "thinkprm"), 3e-4),
}
"""How each judge is trained, and the first guess of its learning rate. The last two learn judgments
that they wrote themselves, in another method's form, kept by the labels: there is no strong teacher
and no code."""

FACTORS, MOST_FACTORS = (0.5, 1.0, 2.0), 6
"""The factors of the first guess that are tried, and how many are at most while the best is at the
edge."""

CHOSEN = {
    "stepwiser": 1.0,
    "absolute_labels": 1.0,
    "no_reasoning": 2.0,
    "unbalanced": 2.0,
    "offline": 0.5,
    "classifier": 1.0,
    "classifier_policy": 0.5,
    "classifier_demonstrations": 0.5,
    "genprm_form": 0.25,
    "thinkprm_form": 2.0,
}
"""The factor that `tune` chose for each judge. Begin a new run directory after a change: runs that
use a judge do not notice that its rate is another."""

CONTROLS: dict[str, tuple[str, Row]] = {
    "shuffled_labels": ("stepwiser", partial(by_grpo, labels="labels_shuffled.jsonl")),
    "as_many_as_absolute": ("stepwiser", partial(by_grpo, labels="labels_as_many.jsonl")),
    "printed_labels": ("stepwiser", partial(by_grpo, labels="labels_printed")),
    "printed_absolute_labels": (
        "absolute_labels",
        partial(by_grpo, labels="labels_printed_absolute"),
    ),
}
"""Rows that differ from another row in their data alone, and have its rate: labels that are
shuffled; as many relative labels as there are absolute ones; labels as the paper prints them."""

STARTS: dict[str, Callable[[SeedRuns], list[Stage]]] = {
    "cold_start": partial(scored, name="cold_start", judge=JUDGE),
    "cold_start_verdicts": partial(scored, name="cold_start_verdicts", judge=JUDGE),
    "classifier_start": classifier_start,
    "genprm_start": partial(prm_start, form="genprm"),
    "thinkprm_start": partial(prm_start, form="thinkprm"),
}
"""What other rows begin with. No Monte Carlo label has reached these judges, but they have learned
from demonstrations whose author knows the truth."""

CORE = (
    "cold_start",
    "cold_start_verdicts",
    "stepwiser",
    "absolute_labels",
    "no_reasoning",
    "classifier",
    "shuffled_labels",
)
"""The rows of the second task."""


def judges(runs: SeedRuns) -> dict[str, list[Stage]]:
    """Returns the stages of every judge of the task, at its chosen rate."""
    rates = {name: rate * CHOSEN[name] for name, (_, rate) in JUDGES.items()}
    rows = {name: row(runs) for name, row in STARTS.items()}
    rows |= {name: row(runs, name, rates[name]) for name, (row, _) in JUDGES.items()}
    rows |= {name: row(runs, name, rates[of]) for name, (of, row) in CONTROLS.items()}
    if runs.task is MOD_10:
        return rows
    return {name: rows[name] for name in CORE}
