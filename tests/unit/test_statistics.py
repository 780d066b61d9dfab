"""Resampling of seeds and items against every possible resample, and Holm's correction against its
definition."""

import itertools

import numpy as np
import pytest

from stepwiser_jax.evaluation.statistics import (
    RESAMPLES_AT_ONCE,
    bootstrap_interval,
    hierarchical_bootstrap,
    holm,
    mean,
    multiplicities,
    paired_bootstrap,
)


def root_mean_square(values):
    """A statistic that is no mean of its items, of each row of draws."""
    values = np.asarray(values, float)
    return lambda draws: np.sqrt(draws @ values**2 / draws.sum(axis=1))


def pair(a, b):
    of_a, of_b = root_mean_square(a), root_mean_square(b)
    return lambda draws: of_b(draws) - of_a(draws)


def every_resample(seeds):
    """The mean difference in each equally likely resample: two seeds, then three items of each."""
    found = []
    for drawn in itertools.product(range(len(seeds)), repeat=len(seeds)):
        rows = itertools.product(itertools.product(range(3), repeat=3), repeat=len(seeds))
        for of_slots in rows:
            differences = []
            for s, of_slot in zip(drawn, of_slots, strict=True):
                a, b = (np.take(side, of_slot) for side in seeds[s])
                differences.append(np.sqrt(np.mean(b**2)) - np.sqrt(np.mean(a**2)))
            found.append(np.mean(differences))
    return np.array(found)


SEEDS = [([1.0, 2.0, 4.0], [2.0, 3.0, 3.0]), ([3.0, 1.0, 2.0], [2.5, 2.0, 3.5])]
"""Of each seed both sides' items; the first is nearly a draw, the second is not."""


@pytest.mark.parametrize("seeds", [SEEDS, [SEEDS[1], SEEDS[1]], SEEDS[::-1]])
def test_seeds_and_items_are_resampled(seeds):
    exact = every_resample(seeds)
    found = hierarchical_bootstrap([pair(a, b) for a, b in seeds], [3, 3], seed=0, samples=40_000)
    tail = min(np.mean(exact <= 0), np.mean(exact >= 0))
    assert found.p == pytest.approx(2 * tail, abs=0.01)
    assert [found.low, found.high] == pytest.approx(np.quantile(exact, [0.025, 0.975]), abs=0.05)
    assert found.value == pytest.approx(np.mean([pair(a, b)(np.ones((1, 3)))[0] for a, b in seeds]))


def test_the_noise_of_seeds_is_in_p():
    """Each seed is certain of its difference; the mean of both is not."""
    rng = np.random.default_rng(0)
    a, noise = rng.random(400), rng.normal(0, 0.1, 400)
    differences = [pair(a, a + gain + noise) for gain in (0.3, -0.1)]
    alone = [hierarchical_bootstrap([difference], [400], seed=0).p for difference in differences]
    assert max(alone) < 0.001
    assert hierarchical_bootstrap(differences, [400, 400], seed=0).p > 0.3


def test_one_seed_is_a_paired_bootstrap():
    rng = np.random.default_rng(3)
    a, b = rng.random(30), rng.random(30) + 0.1
    expected = paired_bootstrap(root_mean_square(a), root_mean_square(b), np.zeros(30), seed=0)
    found = hierarchical_bootstrap([pair(a, b)], [30], seed=0)
    assert found.value == pytest.approx(expected.value)
    assert found.p == pytest.approx(expected.p, abs=0.03)
    assert found.low == pytest.approx(expected.low, abs=0.02)


def test_p_is_never_0_and_no_difference_is_1():
    same = pair([1.0, 2.0], [1.0, 2.0])
    assert hierarchical_bootstrap([same, same], [2, 2], seed=0, samples=99).p == 1
    better = pair([1.0, 1.0], [2.0, 2.0])
    assert hierarchical_bootstrap([better] * 3, [2] * 3, seed=0, samples=99).p == 0.02


def test_items_are_drawn_alike():
    draws = multiplicities(np.zeros(5), 4000, np.random.default_rng(0))
    assert draws.shape == (4000, 5) and set(draws.sum(axis=1)) == {5}
    assert draws.mean(axis=0) == pytest.approx(np.ones(5), abs=0.05)
    # Binomial: 5 draws, each this item with a probability of 1/5.
    assert draws.var(axis=0) == pytest.approx(np.full(5, 5 * 0.2 * 0.8), abs=0.06)


def test_few_resamples_are_in_memory_at_once():
    blocks, values = [], np.arange(40)

    def statistic(times):
        blocks.append(times)
        return mean(values)(times)

    samples = 2 * RESAMPLES_AT_ONCE + 1
    found = bootstrap_interval(statistic, np.zeros(40), seed=0, samples=samples)
    assert [len(times) for times in blocks] == [RESAMPLES_AT_ONCE] * 2 + [1]
    together = [np.repeat(values, times).mean() for times in np.concatenate(blocks)]
    assert found == pytest.approx(np.quantile(together, [0.025, 0.975]).tolist())
    assert len(set(together)) > RESAMPLES_AT_ONCE, "each block has other draws"


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_a_corrected_p_is_below_a_level_if_the_step_down_test_rejects(count):
    rng = np.random.default_rng(count)
    p = rng.random(count) ** 4
    p[count // 2] = p[0]  # a tie
    for level in (0.001, 0.01, 0.05, 0.2, 0.7):
        rejected = set()
        for rank, i in enumerate(sorted(range(count), key=p.__getitem__)):
            if p[i] * (count - rank) >= level:
                break
            rejected.add(i)
        assert {i for i, corrected in enumerate(holm(p)) if corrected < level} == rejected
    assert all(corrected >= of for corrected, of in zip(holm(p), p, strict=True))
    assert max(holm(p)) <= 1


def test_no_claims_need_no_correction():
    assert holm([]) == []
