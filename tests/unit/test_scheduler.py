"""The scheduler alone: no model, no arrays. A simulated device ends rows as it likes."""

import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwiser_jax.inference.params import Prefix, SampleRequest
from stepwiser_jax.inference.scheduler import Grid, Scheduler, choose_grid


def make_prefixes(*num_samples):
    return [
        Prefix([1], [SampleRequest(f"{p}/{g}", 1, 1) for g in range(count)])
        for p, count in enumerate(num_samples)
    ]


def row_ids(started):
    return {row: sample.row_id for row, _, sample in started}


def test_it_needs_neither_jax_nor_numpy():
    code = (
        "import sys, stepwiser_jax.inference.scheduler as s; "
        "sys.exit(bool({'jax', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("rows", "num_prefixes", "num_samples", "grid"),
    [
        ((64,), 100, 9, Grid(7, 9)),  # 4 x 16 would hold 36 rows
        ((64,), 100, 16, Grid(4, 16)),
        ((64,), 100, 40, Grid(4, 16)),
        ((64,), 1, 23, Grid(2, 32)),  # no row more with 23: the shape that other numbers share
        ((64,), 3, 20, Grid(3, 20)),
        ((64, 128), 7, 9, Grid(7, 9)),
        ((64, 128), 8, 9, Grid(8, 16)),
        ((4, 64), 4, 1, Grid(4, 1)),
    ],
)
def test_a_grid_keeps_its_rows_busy(rows, num_prefixes, num_samples, grid):
    assert choose_grid(rows, num_prefixes, num_samples) == grid


def test_each_shard_holds_whole_slots():
    assert choose_grid((64,), 4, 16, shards=4) == Grid(4, 16)
    assert choose_grid((64,), 1, 64, shards=4) == Grid(4, 16)
    assert choose_grid((24,), 100, 5, shards=8) == Grid(8, 3)


def test_rows_and_slots_are_refilled():
    """2 slots of 2 rows, 3 prefixes with 3, 1 and 2 samples: step by step."""
    scheduler = Scheduler(make_prefixes(3, 1, 2), (4,), samples_per_prefix=2)
    assert scheduler.grid == Grid(2, 2)
    assert [(q, prefix.samples[0].row_id) for q, prefix in scheduler.admit_prefixes()] == [
        (0, "0/0"),
        (1, "1/0"),
    ]
    assert row_ids(scheduler.start_samples()) == {0: "0/0", 1: "0/1", 2: "1/0"}
    assert scheduler.exit_at() == 2, "one of three rows has ended"
    assert [sample.row_id for sample in scheduler.finish([1])] == ["0/1"]
    assert scheduler.admit_prefixes() == [], "both slots have running rows"
    assert row_ids(scheduler.start_samples()) == {1: "0/2"}
    scheduler.finish([0, 2])
    assert [q for q, _ in scheduler.admit_prefixes()] == [1], "row 1 still reads slot 0"
    assert row_ids(scheduler.start_samples()) == {2: "2/0", 3: "2/1"}
    assert scheduler.exit_at() == 0, "nothing waits, and there is no smaller grid"
    scheduler.finish([1, 2, 3])
    assert not scheduler.has_work


def test_the_last_rows_move_to_a_smaller_grid():
    scheduler = Scheduler(make_prefixes(5, 4), (2, 4, 8), samples_per_prefix=4)
    scheduler.admit_prefixes()
    scheduler.start_samples()
    assert scheduler.grid == Grid(2, 4)
    scheduler.finish([0, 1, 3, 4, 6])
    assert scheduler.shrink() is None, "a sample waits"
    assert row_ids(scheduler.start_samples()) == {0: "0/4"}
    assert scheduler.exit_at() == 3
    assert scheduler.shrink() == [0, 2, 5, 7], "in the order of the rows, not of their start"
    assert scheduler.grid == Grid(4, 1)
    assert {row: sample.row_id for row, sample in scheduler.running.items()} == {
        0: "0/4",
        1: "0/2",
        2: "1/1",
        3: "1/3",
    }
    assert scheduler.exit_at() == 2
    assert scheduler.shrink() is None, "4 rows do not fit 2"
    scheduler.finish([0, 1, 2, 3])
    assert scheduler.shrink() is None and not scheduler.has_work


def test_a_burst_ends_when_an_eighth_of_the_rows_can_be_refilled():
    scheduler = Scheduler(make_prefixes(64), (32,), samples_per_prefix=32)
    scheduler.admit_prefixes()
    scheduler.start_samples()
    assert scheduler.exit_at() == 28


def test_samples_that_are_not_needed_are_left_out():
    """The question is asked when a sample would start, after the answers to earlier ones."""
    asked, unneeded = [], {"0/0", "1/1"}

    def is_needed(sample):
        asked.append(sample.row_id)
        return sample.row_id not in unneeded

    scheduler = Scheduler(make_prefixes(3, 2), (2,), samples_per_prefix=1, is_needed=is_needed)
    scheduler.admit_prefixes()
    assert row_ids(scheduler.start_samples()) == {0: "0/1", 1: "1/0"}
    assert asked == ["0/0", "0/1", "1/0"]
    unneeded.add("0/2")
    scheduler.finish([0, 1])
    scheduler.admit_prefixes()
    assert scheduler.start_samples() == []
    assert not scheduler.has_work


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=12)
grids = st.sampled_from([(1, (4,)), (1, (2, 8)), (1, (3, 5, 16)), (2, (4, 16)), (4, (8, 32))])


@given(sizes, grids, st.integers(1, 6), st.booleans(), st.randoms(use_true_random=False))
def test_each_sample_runs_once_beside_its_prefix(counts, grid, most, skips, rng: random.Random):
    """Whatever rows the device ends: what must hold of any run, to its end."""
    shards, allowed_rows = grid
    skipped = {f"{p}/{g}" for p, n in enumerate(counts) for g in range(n) if skips and g % 3 == 1}
    scheduler = Scheduler(
        make_prefixes(*counts),
        allowed_rows,
        shards=shards,
        samples_per_prefix=most,
        is_needed=lambda sample: sample.row_id not in skipped,
    )
    assert scheduler.grid.slots % shards == 0 and scheduler.grid.rows <= allowed_rows[-1]
    holds, occupied, ended, order = {}, {}, Counter(), []
    while scheduler.has_work:
        for q, prefix in scheduler.admit_prefixes():
            assert all(row // scheduler.grid.rows_per_slot != q for row in occupied)
            holds[q] = prefix
            order.append(prefix.samples[0].row_id)
        for row, prefix, sample in scheduler.start_samples():
            assert row not in occupied and sample in prefix.samples
            assert holds[row // scheduler.grid.rows_per_slot] is prefix
            occupied[row] = sample.row_id
        assert {row: sample.row_id for row, sample in scheduler.running.items()} == occupied
        if not occupied:
            continue
        assert max(occupied) < scheduler.grid.rows
        exit_at = scheduler.exit_at()
        assert 0 <= exit_at < len(occupied)
        rows = rng.sample(sorted(occupied), rng.randint(len(occupied) - exit_at, len(occupied)))
        ended.update(occupied[row] for row in rows)
        assert [s.row_id for s in scheduler.finish(rows)] == [occupied.pop(row) for row in rows]
        before = scheduler.grid.rows
        if moves := scheduler.shrink():
            assert not scheduler.has_waiting and scheduler.grid.rows < before
            assert scheduler.grid.rows in allowed_rows and scheduler.grid.rows_per_slot == 1
            occupied = {new: occupied[old] for new, old in enumerate(moves)}
    everything = {f"{p}/{g}" for p, n in enumerate(counts) for g in range(n)}
    assert ended == Counter(everything - skipped)
    assert order == [f"{p}/0" for p in range(len(counts))], "prefixes are admitted in their order"
