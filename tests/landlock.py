"""Whether code can be confined where the tests run."""

import sys

import pytest

from stepwiser_jax.sandbox import confine


def _can_confine() -> bool:
    try:
        return confine._landlock(confine._CREATE_RULESET, None, 0, 1) >= 3
    except OSError:
        return False


needs_landlock = pytest.mark.skipif(
    sys.platform != "linux" or not _can_confine(), reason="needs Linux 6.2 with Landlock"
)
