"""Defines what is compared on the embedded tasks, as stages and their settings.

    base         the quickstart's policy, labels, cold start and held-out solutions
    judges       one row for every way to train a judge, from there on
    searches     every method, steered by StepWiser's judge or by the classifier
    selections   training data chosen by one or the other

Every row of `JUDGES` has one learning rate: its first guess times the best factor, which is
searched for by `stepwiser reproduce --tune` and stands in `CHOSEN`. Rows of `CONTROLS` have the
rate of another row. The second task, which no tuning has seen, has the rows of `CORE` only, at the
same rates.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stepwiser_jax.commands.quickstart import (
    JUDGE,
    JUDGE_ENGINE,
    POLICY_ENGINE,
    SEARCH_SAMPLING,
    SOLVE,
    fine_tuning,
    judge_training,
    optimizer,
    policy_and_labels,
    shared_settings,
)
from stepwiser_jax.commands.reproduce.controls import drawn, truth_examples, with_shuffled_labels
from stepwiser_jax.config import STAGE_CONFIGS
from stepwiser_jax.manifest import read_run_json
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import JudgeExample
from stepwiser_jax.tasks.arithmetic import MOD_10, ArithmeticTask

CHAIN = 416
"""Tokens of the longest conversation, or chain, about a whole solution, prompt included."""

PROBLEMS = 512

DEV_SEED, CANDIDATES_SEED = 20_000, 10_000
"""What is added to the seed for other problems: those that thresholds are chosen on, and those that
the policy learns its own solutions of."""

CLASSIFIER = {"kind": "classifier", "prompt_style": "bare", "max_length": 320}

Settings = dict[str, Any]
Stage = tuple[str, str, Callable[[], Any]]
"""(directory, stage, settings). Settings are a function: some are read from earlier stages. The
stage `EXAMPLES` is none of the product: it is (file, EXAMPLES, what makes the file's records)."""

EXAMPLES = "examples"


@dataclass(frozen=True)
class SeedRuns:
    """Where the runs of one seed and task are, on which split they are evaluated, and for which
    share of its steps every judge is trained."""

    run_dir: Path
    seed: int
    task: ArithmeticTask = MOD_10
    split: str = "test"
    share_of_steps: float = 1.0

    def at(self, name: str) -> str:
        return str(self.run_dir / name)

    def steps(self, of_a_whole_training: int) -> int:
        return round(self.share_of_steps * of_a_whole_training)

    def summary(self, name: str) -> dict[str, Any]:
        return read_run_json(self.run_dir / name, "summary.json")

    def chosen(self, rationales: str) -> int:
        return self.summary(rationales)["chosen"]

    def stage(self, name: str, stage: str, settings: Settings | Callable[[], Settings]) -> Stage:
        """Returns a stage with the seed, no chat templates, and a shared cache of programs."""

        def resolved() -> Settings:
            tree = settings() if callable(settings) else settings
            if "compilation_cache" in STAGE_CONFIGS[stage].model_fields:
                tree = {"compilation_cache": str(self.run_dir.parent / "compiled")} | tree
            return shared_settings(stage, self.seed) | of_task(tree, self.task)

        return name, stage, resolved


def of_task(tree: Settings, task: ArithmeticTask) -> Settings:
    """Returns settings of the quickstart with another task's problems and demonstrations."""

    def renamed(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return of_task(value, task)
        is_generated = key == "source" and value.split("-")[0] == MOD_10.name
        return value.replace(MOD_10.name, task.name, 1) if is_generated else value

    return {key: renamed(key, value) for key, value in tree.items()}


def changed(tree: Settings, **changes: Any) -> Settings:
    """Returns a copy with other values. `grpo__clip_eps_high=0.2` sets a value in a group."""
    tree = copy.deepcopy(tree)
    for key, value in changes.items():
        *groups, last = key.split("__")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return tree


# --- what all rows of a seed share --------------------------------------------------------------


def base(runs: SeedRuns) -> list[Stage]:
    """Returns the stages that all rows share.

    They make the policy, values and labels; the cold start, and the same taught to answer at once;
    held-out solutions for tests and for thresholds.
    """
    shared = shared_stages(runs)
    cold_start = judge_training(runs.run_dir, runs.seed)[0][2]
    verdicts = changed(
        cold_start,
        model={"path": runs.at("cold_start")},
        examples={"source": "arithmetic-verdicts", "limit": 3000, "seed": runs.seed},
        steps=300,
    )

    def heldout(split: str, seed: int) -> Settings:
        return changed(
            shared["rollouts"][1],
            problems={"source": "arithmetic", "split": split, "limit": PROBLEMS, "seed": seed},
            group_size=1,
            block_size=256,
        )

    return [
        *(runs.stage(name, stage, tree) for name, (stage, tree) in shared.items()),
        runs.stage("cold_start", "sft", cold_start),
        runs.stage("cold_start_verdicts", "sft", verdicts),
        runs.stage("heldout", "rollout", heldout(runs.split, runs.seed)),
        runs.stage("heldout_dev", "rollout", heldout("dev", runs.seed + DEV_SEED)),
    ]


def shared_stages(runs: SeedRuns) -> dict[str, tuple[str, Settings]]:
    """Returns the quickstart's stages up to the labels, by directory."""
    stages = policy_and_labels(runs.run_dir, runs.seed)
    return {name: (stage, tree) for name, stage, tree in stages}


def label_sets(runs: SeedRuns) -> dict[str, list[Stage]]:
    """Returns the stages that make each set of labels from what `base` makes, by the set's name."""
    label, rollouts, values = (shared_stages(runs)[n][1] for n in ("labels", "rollouts", "values"))
    lines = {"rollouts": runs.at("rollouts_lines")}
    by_line = changed(rollouts, chunking=[";", "</chunk>"])
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
        # These are the same completions, cut at every line. Half as many are used, so that
        # their labels take as many rollouts.
        "labels_lines": [
            runs.stage("rollouts_lines", "rollout", by_line),
            runs.stage("values_lines", "annotate", changed(values | lines, limit=500)),
            runs.stage(
                "labels_lines", "label", label | lines | {"values": runs.at("values_lines")}
            ),
        ],
    }


# --- the judges that are compared ---------------------------------------------------------------


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


def learned(
    runs: SeedRuns, name: str, rate: float, start: str, source: str, as_in: str | None = None
) -> Stage:
    """Returns the fine-tuning of the model that wrote judgments on those that were kept. `as_in`
    names a larger set: each example is then learned as often as those of that set are."""

    def tree() -> Settings:
        share = runs.chosen(source) / runs.chosen(as_in) if as_in else 1.0
        return changed(
            fine_tuning(source, 1, runs.seed, max(1, round(share * runs.steps(STEPS)))),
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
SAMPLES = {1.0: 2, 0.1: 8}
"""Rationales of each solution, by the share of the labelled solutions that is used. With few
labels, each solution gets more."""


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


def by_prm(form: str, runs: SeedRuns, name: str, rate: float, share: float = 1.0) -> list[Stage]:
    """Returns the stages that sample from its start, keep what fits the labels, and learn it. A
    part of the labels is learned for as many epochs as all of them, which a row before it does."""
    whole, kept = (f"{form}_rationales_{part:g}" for part in (1.0, share))

    def asked() -> Settings:
        solutions = runs.summary("labels")["classifier_examples"]
        return {
            "judge": {
                "kind": form,
                "path": runs.at(f"{form}_start"),
                "prompt_style": "bare",
                **PRM_FORMS[form].asked_for,
                "sampling": {"max_new_tokens": PRM_FORMS[form].max_new_tokens},
                "engine": PRM_ENGINE,
            },
            "examples": {
                "source": runs.at("labels"),
                "limit": max(1, round(share * solutions)),
            },
            "samples": SAMPLES[share],
            "block_size": 256,
        }

    return [
        *prm_start(runs, form),
        runs.stage(kept, "rejection-sample", asked),
        learned(runs, name, rate, f"{form}_start", kept, as_in=whole),
        *prm_scored(runs, form, name),
    ]


Row = Callable[[SeedRuns, str, float], list[Stage]]
JUDGES: dict[str, tuple[Row, float]] = {
    "stepwiser": (by_grpo, 2e-4),
    "absolute_labels": (partial(by_grpo, labels="labels_absolute"), 2e-4),
    "printed_labels": (partial(by_grpo, labels="labels_printed"), 2e-4),
    "printed_absolute_labels": (partial(by_grpo, labels="labels_printed_absolute"), 2e-4),
    "lines": (partial(by_grpo, labels="labels_lines"), 2e-4),
    "no_reasoning": (
        partial(by_grpo, cold_start="cold_start_verdicts", reward_args={"format_penalty": 1.0}),
        2e-4,
    ),
    "unbalanced": (partial(by_grpo, labels="labels_unbalanced"), 2e-4),
    "clip_higher": (partial(by_grpo, updates_per_iteration=4), 1e-4),
    "clip": (partial(by_grpo, updates_per_iteration=4, grpo__clip_eps_high=0.2), 1e-4),
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
    "absolute_labels": 2.0,
    "printed_labels": 1.0,
    "printed_absolute_labels": 1.0,
    "lines": 2.0,
    "no_reasoning": 1.0,
    "unbalanced": 0.5,
    "clip_higher": 1.0,
    "clip": 1.0,
    "offline": 1.0,
    "classifier": 2.0,
    "classifier_policy": 2.0,
    "classifier_demonstrations": 1.0,
    "genprm_form": 1.0,
    "thinkprm_form": 1.0,
}
"""The factor that `tune` chose for each judge. Begin a new run directory after a change: runs that
use a judge do not notice that its rate is another."""

CONTROLS: dict[str, tuple[str, Row]] = {
    "shuffled_labels": ("stepwiser", partial(by_grpo, labels="labels_shuffled.jsonl")),
    "as_many_as_absolute": ("stepwiser", partial(by_grpo, labels="labels_as_many.jsonl")),
    "genprm_form_10": ("genprm_form", partial(by_prm, "genprm", share=0.1)),
    "thinkprm_form_10": ("thinkprm_form", partial(by_prm, "thinkprm", share=0.1)),
}
"""Rows that differ from another row in their data alone, and have its rate: labels that are
shuffled; as many relative labels as there are absolute ones; a tenth of the labelled solutions."""

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


# --- what judges are used for -------------------------------------------------------------------


def searches(runs: SeedRuns) -> list[Stage]:
    """Returns the stages that run every method on the same problems, at the quickstart's
    temperature of searches. Chunk-reset takes the likeliest chunk first, but for one stage."""
    shared = {
        "policy": {"path": runs.at("policy")},
        "problems": {
            "source": "arithmetic",
            "split": runs.split,
            "limit": PROBLEMS,
            "seed": runs.seed,
        },
        "majority": list(range(1, 9)),
        "best_of": [8],
        "beam": {"beams": 4, "width": 2},
        "dvts": {"beams": 4, "width": 2},
        "sampling": SEARCH_SAMPLING,
        "first_attempt": "greedy",
        "max_chunk_tokens": 24,
        "engine": POLICY_ENGINE,
        "block_size": 64,
    }
    few = {"best_of": [], "beam": None, "dvts": None}
    alone = shared | few | {"majority": []}
    judge = JUDGE | {"path": runs.at("stepwiser")}
    of_judge = shared | (few if runs.task is not MOD_10 else {}) | {"judge": judge}
    sampled = alone | {"first_attempt": "sampled", "judge": judge}

    def by_classifier() -> Settings:
        threshold = runs.summary("classifier_dev")["threshold"]
        judge = CLASSIFIER | {"path": runs.at("classifier"), "threshold": threshold}
        return alone | {"judge": judge}

    return [
        runs.stage("search", "search", of_judge),
        runs.stage("search_sampled", "search", sampled),
        runs.stage("search_classifier", "search", by_classifier),
    ]


SELECTIONS: dict[str, tuple[str | None, bool]] = {
    "random": (None, False),
    "outcome": (None, True),
    "stepwiser": ("stepwiser", True),
    "stepwiser_alone": ("stepwiser", False),
    "classifier": ("classifier", True),
}
"""The judge whose scores choose a solution of each problem, and whether among right ones only."""


def selections(runs: SeedRuns) -> list[Stage]:
    """Returns the stages in which the policy learns its own solutions, one for each problem. Judges
    were trained on other problems."""
    rollouts = shared_stages(runs)["rollouts"][1]
    candidates = changed(
        rollouts,
        problems__seed=runs.seed + CANDIDATES_SEED,
        problems__limit=300,
        group_size=8,
    )
    stages = [runs.stage("candidates", "rollout", candidates)]
    for name, (scorer, only_correct) in SELECTIONS.items():
        tree = {
            "rollouts": runs.at("candidates"),
            "tokenizer": runs.at("policy"),
            "only_correct": only_correct,
        }
        if scorer == "stepwiser":
            tree |= {"judge": JUDGE | {"path": runs.at(scorer)}}
        elif scorer == "classifier":
            tree |= {"judge": CLASSIFIER | {"path": runs.at(scorer)}}
        sft = changed(
            fine_tuning(f"select_{name}", 1, runs.seed, 150),
            model={"path": runs.at("policy")},
            examples={"source": runs.at(f"select_{name}")},
            batch_size=8,
            training__optimizer=optimizer(3e-4, 10, 0.1),
        )
        stages += [
            runs.stage(f"select_{name}", "select-responses", tree),
            runs.stage(f"selected_{name}", "sft", sft),
            solved(runs, f"selected_{name}"),
        ]
    return [*stages, solved(runs, "policy")]


def solved(runs: SeedRuns, policy: str) -> Stage:
    """Returns the stage that says how often a policy's samples are right."""
    tree = {
        "policy": {"path": runs.at(policy)},
        "problems": {
            "source": "arithmetic",
            "split": runs.split,
            "limit": PROBLEMS,
            "seed": runs.seed,
        },
        "group_size": 4,
        "sampling": SOLVE,
        "engine": POLICY_ENGINE,
        "block_size": 256,
    }
    return runs.stage(f"{policy}_solves", "rollout", tree)


def every_stage(runs: SeedRuns) -> list[Stage]:
    """Returns the stages of one seed in order. One that several rows need occurs several times."""
    return [
        *base(runs),
        *(stage for row in judges(runs).values() for stage in row),
        *searches(runs),
        *(selections(runs) if runs.task is MOD_10 else []),
    ]
