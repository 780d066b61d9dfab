"""Defines what is compared on the embedded arithmetic task, as stages and their settings.

    base         the quickstart's policy, labels, cold start and held-out solutions
    judges       one row for every way to train a judge, from there on
    searches     every method, steered by StepWiser's judge or by the classifier
    selections   training data chosen by one or the other

Every row of `JUDGES` has one learning rate: its first guess times the best of `FACTORS`, which is
searched for by `stepwiser reproduce --tune` and stands in `CHOSEN`.
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
    SOLVE,
    fine_tuning,
    judge_training,
    optimizer,
    policy_and_labels,
    shared_settings,
)
from stepwiser_jax.config import STAGE_CONFIGS
from stepwiser_jax.manifest import read_run_json
from stepwiser_jax.tasks import arithmetic

CHAIN = 416
"""Tokens of the longest conversation, or chain, about a whole solution, prompt included."""

PROBLEMS = 512

CLASSIFIER = {"kind": "classifier", "prompt_style": "bare", "max_length": 320}

Settings = dict[str, Any]
Stage = tuple[str, str, Callable[[], Settings]]
"""(directory, stage, settings). Settings are a function: some are read from earlier stages."""


@dataclass(frozen=True)
class SeedRuns:
    """Where the runs of one seed are, on which split they are evaluated, and for which share of its
    steps every judge is trained."""

    run_dir: Path
    seed: int
    split: str = "test"
    share_of_steps: float = 1.0

    def at(self, name: str) -> str:
        return str(self.run_dir / name)

    def steps(self, of_a_whole_training: int) -> int:
        return round(self.share_of_steps * of_a_whole_training)

    def summary(self, name: str) -> dict[str, Any]:
        return read_run_json(self.run_dir / name, "summary.json")

    def stage(self, name: str, stage: str, settings: Settings | Callable[[], Settings]) -> Stage:
        """Returns a stage with the seed, no chat templates, and a shared cache of programs."""

        def resolved() -> Settings:
            tree = settings() if callable(settings) else settings
            if "compilation_cache" in STAGE_CONFIGS[stage].model_fields:
                tree = {"compilation_cache": str(self.run_dir.parent / "compiled")} | tree
            return shared_settings(stage, self.seed) | tree

        return name, stage, resolved


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

    They make the policy, values, and labels under every rule that is trained on; the cold start,
    and the same taught to answer at once; held-out solutions for tests and for thresholds.
    """
    shared = {
        name: (stage, tree) for name, stage, tree in policy_and_labels(runs.run_dir, runs.seed)
    }
    label, rollouts, values = (shared[name][1] for name in ("labels", "rollouts", "values"))
    lines = {"rollouts": runs.at("rollouts_lines")}
    cold_start = judge_training(runs.run_dir, runs.seed)[0][2]
    verdicts = changed(
        cold_start,
        model={"path": runs.at("cold_start")},
        examples={"source": "arithmetic-verdicts", "limit": 3000, "seed": runs.seed},
        steps=300,
    )
    heldout = changed(
        rollouts,
        problems={"source": "arithmetic", "limit": PROBLEMS, "seed": runs.seed},
        group_size=1,
        block_size=256,
    )
    return [
        *(runs.stage(name, stage, tree) for name, (stage, tree) in shared.items()),
        runs.stage("labels_absolute", "label", changed(label, rule="abs_q")),
        runs.stage("labels_unbalanced", "label", changed(label, balance=False)),
        # These are the same completions, cut at every line. Half as many are used, so that
        # their labels take as many rollouts.
        runs.stage("rollouts_lines", "rollout", changed(rollouts, chunking=[";", "</chunk>"])),
        runs.stage("values_lines", "annotate", changed(values | lines, limit=500)),
        runs.stage("labels_lines", "label", label | lines | {"values": runs.at("values_lines")}),
        runs.stage("cold_start", "sft", cold_start),
        runs.stage("cold_start_verdicts", "sft", verdicts),
        runs.stage("heldout", "rollout", changed(heldout, problems__split=runs.split)),
        runs.stage("heldout_dev", "rollout", changed(heldout, problems__split="dev")),
    ]


# --- the judges that are compared ---------------------------------------------------------------


def scored(runs: SeedRuns, name: str, **changes: Any) -> Stage:
    """Returns the evaluation of a judge, with these settings, on the held-out solutions."""
    tree = {
        "judge": JUDGE | {"path": runs.at(name)} | changes,
        "benchmark": {"source": runs.at("heldout")},
        "block_size": 256,
    }
    return runs.stage(f"{name}_score", "evaluate", tree)


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
    return [runs.stage(name, "train-judge", tree), scored(runs, name)]


def learned(runs: SeedRuns, name: str, rate: float, start: str, source: str) -> Stage:
    """Returns the fine-tuning of the model that wrote judgments on those that were kept."""
    tree = changed(
        fine_tuning(source, 1, runs.seed, runs.steps(150)),
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
        scored(runs, name),
    ]


def by_classifier(runs: SeedRuns, name: str, rate: float) -> list[Stage]:
    """Returns the stages of a classifier. It begins with the same model and learns the same labels;
    its threshold is chosen on other solutions."""
    tree = {
        "model": {"path": runs.at("cold_start")},
        "examples": {"source": runs.at("labels")},
        "steps": runs.steps(160),
        "batch_size": 8,
        "max_length": 320,
        "training": {"optimizer": optimizer(rate, 30, 0.1)},
    }
    judge = CLASSIFIER | {"path": runs.at(name)}
    dev = {
        "judge": judge,
        "benchmark": {"source": runs.at("heldout_dev")},
        "threshold_subset": arithmetic.MOD_10.name,
    }

    def at_the_threshold() -> Settings:
        threshold = runs.summary(f"{name}_threshold")["threshold"]
        heldout = {"source": runs.at("heldout")}
        return {"judge": judge | {"threshold": threshold}, "benchmark": heldout}

    return [
        runs.stage(name, "train-classifier", tree),
        runs.stage(f"{name}_threshold", "evaluate", dev),
        runs.stage(f"{name}_score", "evaluate", at_the_threshold),
    ]


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
SAMPLES = {1.0: 2, 0.1: 8, 0.01: 32}
"""Rationales of each solution, by the share of the labelled solutions that is used. With few
labels, each solution gets more."""


def prm_start(runs: SeedRuns, form: str) -> list[Stage]:
    """Returns the cold start, taught a form by the same imperfect teacher, without labels."""
    steps = PRM_FORMS[form].start_steps
    tree = changed(
        fine_tuning(f"arithmetic-{form}", 8 * steps, runs.seed, steps),
        model={"path": runs.at("cold_start")},
        max_length=CHAIN,
    )
    return [runs.stage(f"{form}_start", "sft", tree), prm_scored(runs, form, f"{form}_start")]


def prm_scored(runs: SeedRuns, form: str, name: str) -> Stage:
    sampling = {"max_new_tokens": PRM_FORMS[form].max_new_tokens}
    settings = PRM_FORMS[form].judges_by
    return scored(runs, name, kind=form, sampling=sampling, engine=PRM_ENGINE, **settings)


def by_prm(form: str, runs: SeedRuns, name: str, rate: float, share: float = 1.0) -> list[Stage]:
    """Returns the stages that sample from its start, keep what fits the labels, and learn it."""
    kept = f"{form}_rationales_{share:g}"

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
            "balance": share > 0.01,  # the few that are kept may be all of one kind
            "block_size": 256,
        }

    return [
        *prm_start(runs, form),
        runs.stage(kept, "rejection-sample", asked),
        learned(runs, name, rate, f"{form}_start", kept),
        prm_scored(runs, form, name),
    ]


Row = Callable[[SeedRuns, str, float], list[Stage]]
JUDGES: dict[str, tuple[Row, float]] = {
    "stepwiser": (by_grpo, 2e-4),
    "absolute_labels": (partial(by_grpo, labels="labels_absolute"), 2e-4),
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
    "genprm": (partial(by_prm, "genprm"), 3e-4),
    "thinkprm": (partial(by_prm, "thinkprm"), 3e-4),
}
"""How each judge is trained, and the first guess of its learning rate."""

FACTORS = (0.5, 1.0, 2.0)
CHOSEN = {
    "stepwiser": 1.0,
    "absolute_labels": 2.0,
    "lines": 2.0,
    "no_reasoning": 1.0,
    "unbalanced": 0.5,
    "clip_higher": 1.0,
    "clip": 1.0,
    "offline": 1.0,
    "classifier": 2.0,
    "genprm": 1.0,
    "thinkprm": 1.0,
}
"""The factor of `FACTORS` that `tune` chose for each judge. Begin a new run directory after a
change: runs that use a judge do not notice that its rate is another."""

FEWER_LABELS: dict[str, tuple[str, Row]] = {
    "genprm_10": ("genprm", partial(by_prm, "genprm", share=0.1)),
    "genprm_1": ("genprm", partial(by_prm, "genprm", share=0.01)),
    "thinkprm_10": ("thinkprm", partial(by_prm, "thinkprm", share=0.1)),
    "thinkprm_1": ("thinkprm", partial(by_prm, "thinkprm", share=0.01)),
}
"""Rows that learn from 10% and 1% of the labelled solutions, at the rate of the whole row."""


STARTS = ("cold_start", "cold_start_verdicts", *(f"{form}_start" for form in PRM_FORMS))
"""The judges that have not yet seen a label."""


def judges(runs: SeedRuns) -> dict[str, list[Stage]]:
    """Returns the stages of every judge, at its chosen rate."""
    rates = {name: rate * CHOSEN[name] for name, (_, rate) in JUDGES.items()}
    rows = {name: row(runs, name, rates[name]) for name, (row, _) in JUDGES.items()}
    return rows | {name: row(runs, name, rates[of]) for name, (of, row) in FEWER_LABELS.items()}


# --- what judges are used for -------------------------------------------------------------------


def searches(runs: SeedRuns) -> list[Stage]:
    """Returns the stages that run every method with the same problems and budget of tokens."""
    shared = {
        "policy": {"path": runs.at("policy")},
        "problems": {
            "source": "arithmetic",
            "split": runs.split,
            "limit": PROBLEMS,
            "seed": runs.seed,
        },
        "majority": [8],
        "best_of": [8],
        "beam": {"beams": 4, "width": 2},
        "dvts": {"beams": 4, "width": 2},
        "token_budget": 320,
        "sampling": SOLVE,
        "max_chunk_tokens": 24,
        "engine": POLICY_ENGINE,
        "block_size": 64,
    }
    by_classifier = changed(
        shared,
        judge=CLASSIFIER | {"path": runs.at("classifier")},
        majority=[],
        best_of=[],
        beam=None,
        dvts=None,
    )
    return [
        runs.stage("search", "search", shared | {"judge": JUDGE | {"path": runs.at("stepwiser")}}),
        runs.stage("search_classifier", "search", lambda: with_threshold(runs, by_classifier)),
    ]


def with_threshold(runs: SeedRuns, tree: Settings) -> Settings:
    threshold = runs.summary("classifier_threshold")["threshold"]
    return changed(tree, judge__threshold=threshold)


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
    _, (_, _, rollouts), *_ = policy_and_labels(runs.run_dir, runs.seed)
    candidates = changed(
        rollouts, problems__seed=runs.seed + 10_000, problems__limit=300, group_size=8
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
        scored(runs, "cold_start"),
        scored(runs, "cold_start_verdicts"),
        *(stage for row in judges(runs).values() for stage in row),
        *searches(runs),
        *selections(runs),
    ]
