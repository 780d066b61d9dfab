"""What several processes tell of one another's end, and where they stop together."""

import threading

import jax
import numpy as np
import pytest

from stepwiser_jax.distributed import hosts


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("UNKNOWN: Gloo all-reduce failed: Connection closed by peer", SystemExit),
        ("INTERNAL: Failed to synchronize: the task was reset", SystemExit),
        ("RESOURCE_EXHAUSTED: Used 20G of 16G hbm", jax.errors.JaxRuntimeError),
        (
            "INTERNAL: RET_CHECK failure: Unexpected device_id 4\nwhile compiling %all-reduce",
            jax.errors.JaxRuntimeError,
        ),
    ],
)
def test_a_peer_that_is_gone_is_told_from_what_cannot_be_compiled(
    monkeypatch, capsys, message, expected
):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(expected), hosts.report_lost_peers():
        raise jax.errors.JaxRuntimeError(message)
    assert (message.splitlines()[0] in capsys.readouterr().err) == (expected is SystemExit)


class Store:
    """A coordination service: what processes tell one another by name."""

    def __init__(self):
        self.told = {}

    def key_value_set(self, key, value):
        assert key not in self.told
        self.told[key] = value

    def key_value_dir_get(self, directory):
        return [item for item in list(self.told.items()) if item[0].startswith(directory + "/")]


@pytest.mark.parametrize("seed", range(5))
def test_all_processes_stop_at_the_same_point(seed):
    """At whatever speeds they go, and however many are asked; none stops unasked."""
    rng, store, over = np.random.default_rng(seed), Store(), threading.Event()
    asked_at = [*rng.integers(50, 60, 3).tolist(), None]
    pauses = rng.uniform(0, 0.002, 4).tolist()
    agreements = [hosts.StopAgreement() for _ in asked_at]
    stopped = {}

    def watch(i):
        while not over.wait(0.003):
            agreements[i].exchange(store, i, len(agreements))

    def work(i):
        for point in range(2000):
            if agreements[i].here(asked_at[i] is not None and point >= asked_at[i]):
                stopped[i] = point
                return
            over.wait(pauses[i])

    watches, works = (
        [threading.Thread(target=target, args=(i,), daemon=True) for i in range(4)]
        for target in (watch, work)
    )
    for thread in watches + works:
        thread.start()
    for thread in works:
        thread.join(60)
    over.set()
    assert sorted(stopped) == [0, 1, 2, 3] and len(set(stopped.values())) == 1
    assert min(stopped.values()) >= min(asked_at[:3])


def test_one_process_stops_where_it_is_asked():
    assert [hosts.all_stop_here(asked) for asked in (False, True)] == [False, True]
