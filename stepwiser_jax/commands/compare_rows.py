"""What is compared on the embedded arithmetic task, as stages and their settings.

    base         the quickstart's policy, labels, cold start and held-out solutions
    judges       one row for every way to train a judge, from there on
    searches     every method, steered by StepWiser's judge or by the classifier
    selections   training data chosen by one or the other

Every row of `JUDGES` has one learning rate: its first guess times the best of `FACTORS`, which is
searched for by `stepwiser compare --tune` and stands in `CHOSEN`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stepwiser_jax.commands.quickstart import (
    JUDGE_ENGINE,
    POLICY_ENGINE,
    SOLVE,
    fine_tuning,
    judge_training,
    optimizer,
    policy_and_labels,
)
from stepwiser_jax.config import STAGE_CONFIGS
from stepwiser_jax.tasks import arithmetic

CHAIN = 416
"""Tokens of the longest conversation, or chain, about a whole solution, prompt included."""

PROBLEMS = 512

Settings = dict[str, Any]
Stage = tuple[str, str, Callable[[], Settings]]
"""(directory, stage, settings): a function, since some are read from the stages before."""


@dataclass(frozen=True)
class Side:
    """Where the runs of one seed are, on which split they are evaluated, and the share of its steps
    that every judge is trained for."""

    run_dir: Path
    seed: int
    split: str = "test"
    length: float = 1.0

    def at(self, name: str) -> str:
        return str(self.run_dir / name)

    def steps(self, of_a_whole_training: int) -> int:
        return round(self.length * of_a_whole_training)

    def summary(self, name: str) -> dict[str, Any]:
        return json.loads((self.run_dir / name / "summary.json").read_text(encoding="utf-8"))

    def stage(self, name: str, stage: str, settings: Settings | Callable[[], Settings]) -> Stage:
        """With the seed, without chat templates, and with the programs that others compiled."""

        def resolved() -> Settings:
            tree = settings() if callable(settings) else settings
            shared = {
                "seed": self.seed,
                "prompt_style": "bare",
                "compilation_cache": str(self.run_dir.parent / "compiled"),
            }
            known = STAGE_CONFIGS[stage].model_fields
            return {key: value for key, value in shared.items() if key in known} | tree

        return name, stage, resolved


def changed(tree: Settings, **changes: Any) -> Settings:
    """A copy with other values: `grpo__clip_eps_high=0.2` is of a group."""
    tree = copy.deepcopy(tree)
    for key, value in changes.items():
        *groups, last = key.split("__")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return tree


# --- what all rows of a seed share --------------------------------------------------------------


def base(side: Side) -> list[Stage]:
    """Policy, values and labels under every rule that is trained on; the cold start, and the same
    taught to answer at once; held-out solutions for tests and for thresholds."""
    shared = {
        name: (stage, tree) for name, stage, tree in policy_and_labels(side.run_dir, side.seed)
    }
    label, rollouts, values = (shared[name][1] for name in ("labels", "rollouts", "values"))
    lines = {"rollouts": side.at("rollouts_lines")}
    cold_start = judge_training(side.run_dir, side.seed)[0][2]
    verdicts = changed(
        cold_start,
        model={"path": side.at("cold_start")},
        data={"source": "arithmetic-verdicts", "count": 3000, "seed": side.seed},
        steps=300,
    )
    heldout = changed(
        rollouts,
        problems={"source": "arithmetic", "limit": PROBLEMS, "seed": side.seed},
        group_size=1,
        problems_per_block=256,
    )
    return [
        *(side.stage(name, stage, tree) for name, (stage, tree) in shared.items()),
        side.stage("labels_absolute", "label", changed(label, rule="abs_q")),
        side.stage("labels_unbalanced", "label", changed(label, balance=False)),
        # The same completions, cut at every line; half as many of them, so that the rollouts that
        # label them are as many.
        side.stage("rollouts_lines", "rollout", changed(rollouts, chunking=[";", "</chunk>"])),
        side.stage("values_lines", "annotate", changed(values | lines, limit=500)),
        side.stage(
            "labels_lines", "label", label | lines | {"annotations": side.at("values_lines")}
        ),
        side.stage("cold_start", "sft", cold_start),
        side.stage("cold_start_verdicts", "sft", verdicts),
        side.stage("heldout", "rollout", changed(heldout, problems__split=side.split)),
        side.stage("heldout_dev", "rollout", changed(heldout, problems__split="dev")),
    ]


# --- the judges that are compared ---------------------------------------------------------------


def scored(side: Side, name: str, **changes: Any) -> Stage:
    """A judge on the held-out solutions."""
    tree = {
        "judge": {"path": side.at(name)},
        "items": side.at("heldout"),
        "max_new_tokens": 32,
        "engine": JUDGE_ENGINE,
        "items_per_block": 256,
    }
    return side.stage(f"{name}_score", "evaluate", changed(tree, **changes))


def by_grpo(
    side: Side,
    name: str,
    rate: float,
    labels: str = "labels",
    cold_start: str = "cold_start",
    **changes: Any,
) -> list[Stage]:
    tree = changed(
        judge_training(side.run_dir, side.seed)[1][2],
        model={"path": side.at(cold_start)},
        examples=side.at(labels),
        iterations=side.steps(60),
        training__optimizer__learning_rate=rate,
        **changes,
    )
    return [side.stage(name, "judge", tree), scored(side, name)]


def learned(side: Side, name: str, rate: float, start: str, source: str) -> Stage:
    """Fine-tuned on judgments that were kept, from the model that wrote them."""
    tree = changed(
        fine_tuning(source, 1, side.seed, side.steps(150)),
        model={"path": side.at(start)},
        data={"source": side.at(source)},
        max_length=CHAIN,
        training__optimizer=optimizer(rate, 10, 0.1),
    )
    return side.stage(name, "sft", tree)


def rationales(side: Side, name: str, start: str, **changes: Any) -> Stage:
    tree = {
        "judge": {"path": side.at(start)},
        "examples": side.at("labels"),
        "samples": 8,
        "sampling": {"max_new_tokens": 32},
        "engine": JUDGE_ENGINE,
        "examples_per_block": 256,
    }
    return side.stage(name, "rationalize", changed(tree, **changes))


def offline(side: Side, name: str, rate: float) -> list[Stage]:
    """Rejection-sampled fine-tuning (StepWiser A.1, RS-FT)."""
    return [
        rationales(side, "rationales", "cold_start"),
        learned(side, name, rate, "cold_start", "rationales"),
        scored(side, name),
    ]


def by_classifier(side: Side, name: str, rate: float) -> list[Stage]:
    """From the same model and on the same labels; the threshold is chosen on other solutions."""
    tree = {
        "model": {"path": side.at("cold_start")},
        "examples": side.at("labels"),
        "steps": side.steps(160),
        "batch_size": 8,
        "max_length": 320,
        "training": {"optimizer": optimizer(rate, 30, 0.1)},
    }
    classify = {"classifier": {"path": side.at(name)}, "max_length": 320}
    dev = classify | {"items": side.at("heldout_dev"), "threshold_subset": arithmetic.SUBSET}

    def at_the_threshold() -> Settings:
        threshold = side.summary(f"{name}_threshold")["threshold"]
        return classify | {"items": side.at("heldout"), "threshold": threshold}

    return [
        side.stage(name, "classifier", tree),
        side.stage(f"{name}_threshold", "classify", dev),
        side.stage(f"{name}_score", "classify", at_the_threshold),
    ]


START_STEPS = {"genprm": 300, "thinkprm": 900}
"""A chain must find in the solution what it verifies, where a turn has it before its eyes: behind
300 steps ThinkPRM's looks at the wrong places."""


def prm_start(side: Side, form: str) -> Stage:
    """A generative reward model's form, taught to the cold start by the same imperfect teacher."""
    steps = START_STEPS[form]
    tree = changed(
        fine_tuning(f"arithmetic-{form}", 8 * steps, side.seed, steps),
        model={"path": side.at("cold_start")},
        max_length=CHAIN,
    )
    return side.stage(f"{form}_start", "sft", tree)


SAMPLES = {1.0: 2, 0.1: 8, 0.01: 32}
"""Of each solution, by the share of them that is asked about: of few labels more is made."""


def by_genprm(side: Side, name: str, rate: float, share: float = 1.0) -> list[Stage]:
    """GenPRM, without code, for which the task has no words; a share of the labelled solutions."""
    asked = {"code": False, "turn_by_turn": True}
    return prm(side, name, rate, share, "genprm", asked, {"code": False}, max_new_tokens=32)


def by_thinkprm(side: Side, name: str, rate: float, share: float = 1.0) -> list[Stage]:
    return prm(side, name, rate, share, "thinkprm", {}, {}, max_new_tokens=CHAIN - 160)


def prm(
    side: Side,
    name: str,
    rate: float,
    share: float,
    form: str,
    asked_for: Settings,
    judges_by: Settings,
    max_new_tokens: int,
) -> list[Stage]:
    """Sampled from its start, kept where it agrees with the labels, learned."""
    engine, kept = JUDGE_ENGINE | {"buckets": [160, 288, CHAIN]}, f"{form}_rationales_{share:g}"

    def asked() -> Settings:
        solutions = side.summary("labels")["classifier_examples"]
        return {
            "judge": {"path": side.at(f"{form}_start")},
            "examples": side.at("labels"),
            form: asked_for,
            "limit": max(1, round(share * solutions)),
            "samples": SAMPLES[share],
            "sampling": {"max_new_tokens": max_new_tokens},
            "engine": engine,
            "examples_per_block": 256,
        }

    return [
        prm_start(side, form),
        side.stage(kept, "rationalize", asked),
        learned(side, name, rate, f"{form}_start", kept),
        scored(side, name, **{form: judges_by}, max_new_tokens=max_new_tokens, engine=engine),
    ]


Row = Callable[[Side, str, float], list[Stage]]
JUDGES: dict[str, tuple[Row, float]] = {
    "stepwiser": (by_grpo, 2e-4),
    "absolute_labels": (partial(by_grpo, labels="labels_absolute"), 2e-4),
    "lines": (partial(by_grpo, labels="labels_lines"), 2e-4),
    "no_reasoning": (
        partial(by_grpo, cold_start="cold_start_verdicts", format_penalty=1.0),
        2e-4,
    ),
    "unbalanced": (partial(by_grpo, labels="labels_unbalanced"), 2e-4),
    "clip_higher": (partial(by_grpo, updates_per_iteration=4), 1e-4),
    "clip": (partial(by_grpo, updates_per_iteration=4, grpo__clip_eps_high=0.2), 1e-4),
    "offline": (offline, 6e-4),
    "classifier": (by_classifier, 1e-3),
    "genprm": (by_genprm, 3e-4),
    "thinkprm": (by_thinkprm, 3e-4),
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
"""The factor of `FACTORS` that `tune` chose for each."""

FEWER_LABELS: dict[str, tuple[str, Row]] = {
    "genprm_10": ("genprm", partial(by_genprm, share=0.1)),
    "genprm_1": ("genprm", partial(by_genprm, share=0.01)),
    "thinkprm_10": ("thinkprm", partial(by_thinkprm, share=0.1)),
    "thinkprm_1": ("thinkprm", partial(by_thinkprm, share=0.01)),
}
"""The same on 10% and 1% of the labelled solutions, at the rate of all."""


def judges(side: Side) -> dict[str, list[Stage]]:
    """The stages of every judge, at its chosen rate."""
    rates = {name: rate * CHOSEN[name] for name, (_, rate) in JUDGES.items()}
    rows = {name: row(side, name, rates[name]) for name, (row, _) in JUDGES.items()}
    return rows | {name: row(side, name, rates[of]) for name, (of, row) in FEWER_LABELS.items()}


# --- what judges are used for -------------------------------------------------------------------

STEPWISER = {
    "judge": {"prompt_style": "bare", "max_new_tokens": 32, "engine": JUDGE_ENGINE},
}
CLASSIFIER = {"classifier": {"prompt_style": "bare", "max_length": 320}}


def searches(side: Side) -> list[Stage]:
    """Every method on the same problems and under the same budget of tokens."""
    shared = {
        "policy": {"path": side.at("policy")},
        "problems": {
            "source": "arithmetic",
            "split": side.split,
            "limit": PROBLEMS,
            "seed": side.seed,
        },
        "majority": [8],
        "best_of": [8],
        "beam": {"beams": 4, "width": 2},
        "dvts": {"beams": 4, "width": 2},
        "token_budget": 320,
        "sampling": SOLVE,
        "max_chunk_tokens": 24,
        "engine": POLICY_ENGINE,
        "problems_per_block": 64,
    }
    classifier = changed(
        shared | CLASSIFIER,
        classifier__path=side.at("classifier"),
    )
    return [
        side.stage(
            "search", "search", changed(shared | STEPWISER, judge__path=side.at("stepwiser"))
        ),
        side.stage("search_classifier", "search", lambda: with_threshold(side, classifier)),
    ]


def with_threshold(side: Side, tree: Settings) -> Settings:
    threshold = side.summary("classifier_threshold")["threshold"]
    return changed(tree, classifier__threshold=threshold)


SELECTIONS: dict[str, tuple[str | None, bool]] = {
    "random": (None, False),
    "outcome": (None, True),
    "stepwiser": ("stepwiser", True),
    "stepwiser_alone": ("stepwiser", False),
    "classifier": ("classifier", True),
}
"""By whose scores a solution of each problem is chosen, and whether among right ones only."""


def selections(side: Side) -> list[Stage]:
    """The policy's own solutions, one a problem, learned by the policy."""
    stages = []
    for name, (scorer, only_correct) in SELECTIONS.items():
        tree = {
            "rollouts": side.at("rollouts"),
            "tokenizer": side.at("policy"),
            "only_correct": only_correct,
        }
        if scorer == "stepwiser":
            tree = changed(tree | STEPWISER, judge__path=side.at(scorer))
        elif scorer == "classifier":
            tree = changed(tree | CLASSIFIER, classifier__path=side.at(scorer))
        sft = changed(
            fine_tuning(f"select_{name}", 1, side.seed, 150),
            model={"path": side.at("policy")},
            data={"source": side.at(f"select_{name}")},
            batch_size=8,
            training__optimizer=optimizer(3e-4, 10, 0.1),
        )
        stages += [
            side.stage(f"select_{name}", "select", tree),
            side.stage(f"selected_{name}", "sft", sft),
            solved(side, f"selected_{name}"),
        ]
    return [*stages, solved(side, "policy")]


def solved(side: Side, policy: str) -> Stage:
    """How often a policy is right, sampled."""
    tree = {
        "policy": {"path": side.at(policy)},
        "problems": {
            "source": "arithmetic",
            "split": side.split,
            "limit": PROBLEMS,
            "seed": side.seed,
        },
        "group_size": 4,
        "sampling": SOLVE,
        "engine": POLICY_ENGINE,
        "problems_per_block": 256,
    }
    return side.stage(f"{policy}_solves", "rollout", tree)


def every_stage(side: Side) -> list[Stage]:
    """Of one seed, in order; what several rows need is named by each of them."""
    return [
        *base(side),
        scored(side, "cold_start"),
        *(stage for row in judges(side).values() for stage in row),
        *searches(side),
        *selections(side),
    ]
