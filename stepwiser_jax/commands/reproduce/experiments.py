"""Defines what is compared on the embedded tasks, as stages and their settings.

base         the quickstart's policy, labels, cold start and held-out solutions
judges       one row for every way to train a judge, from there on (judges.py)
searches     every method, steered by StepWiser's judge or by the classifier
selections   training data chosen by one or the other
"""

from __future__ import annotations

from stepwiser_jax.commands.quickstart import (
    JUDGE,
    POLICY_ENGINE,
    SEARCH_SAMPLING,
    SOLVE,
    fine_tuning,
    judge_training,
    optimizer,
)
from stepwiser_jax.commands.reproduce.judges import CLASSIFIER, judges
from stepwiser_jax.commands.reproduce.seed_runs import (
    SeedRuns,
    Settings,
    Stage,
    changed,
    shared_stages,
)
from stepwiser_jax.tasks.arithmetic import MOD_10

PROBLEMS = 512

DEV_SEED, CANDIDATES_SEED = 20_000, 10_000
"""What is added to the seed for other problems: those that thresholds are chosen on, and those that
the policy learns its own solutions of."""

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
