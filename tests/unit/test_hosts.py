"""What several processes tell of one another's end."""

import jax
import pytest

from stepwiser_jax.runtime import hosts


class Ended(Exception):
    """In place of the end of the process."""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("UNKNOWN: Gloo all-reduce failed: Connection closed by peer", Ended),
        ("INTERNAL: Failed to synchronize: the task was reset", Ended),
        ("RESOURCE_EXHAUSTED: Used 20G of 16G hbm", jax.errors.JaxRuntimeError),
        (
            "INTERNAL: RET_CHECK failure: Unexpected device_id 4\nwhile compiling %all-reduce",
            jax.errors.JaxRuntimeError,
        ),
    ],
)
def test_a_peer_that_is_gone_is_told_from_what_cannot_be_compiled(monkeypatch, message, expected):
    def end(reason):
        raise Ended(reason)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "_end", end)
    with pytest.raises(expected, match=message.split(":")[0]), hosts.noticing_deaths():
        raise jax.errors.JaxRuntimeError(message)
