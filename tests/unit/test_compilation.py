"""The account of what was compiled, and the cache that outlives the process."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from stepwiser_jax.runs import compilation

ROOT = Path(compilation.__file__).parents[2]
PROGRAM = """
import json, sys
import jax
import jax.numpy as jnp
from stepwiser_jax.runs import compilation

compilation.start(sys.argv[1])

@jax.jit
def loop(x):
    return jax.lax.fori_loop(0, 3, lambda i, y: jnp.sin(y @ y + i), x)

values = []
for n in (2, 3):
    with compilation.compiling(f"{n}x{n}"):
        values.append(float(loop(jnp.ones((n, n))).sum()))
print(json.dumps([values, compilation.report()]))
"""


def another_process(cache):
    """(values, report, what it said) of PROGRAM with the cache."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(cache)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return *json.loads(done.stdout), done.stderr


def test_the_next_process_compiles_nothing_and_survives_a_broken_cache(tmp_path):
    cache = tmp_path / "cache"
    values, cold, _ = another_process(cache)
    assert [p["shape"] for p in cold["programs"] if p["program"] == "jit(loop)"] == ["2x2", "3x3"]
    assert cold["cached"] == 0 and cold["compiled"] >= 2
    assert cold["seconds"] >= sum(p["seconds"] for p in cold["programs"]) > 0

    again, warm, said = another_process(cache)
    assert again == values
    assert warm["compiled"] == 0 and warm["cached"] == cold["compiled"]
    assert all(p["cached"] for p in warm["programs"])
    assert "Error reading" not in said

    (directory,) = cache.iterdir()
    assert directory.name == f"cpu-{compilation.processor()}"
    entries = sorted(directory.glob("jit_loop-*-cache"))
    assert len(entries) == 2
    entries[0].write_bytes(entries[0].read_bytes()[:-20])  # killed while it was written
    damaged = bytearray(entries[1].read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    entries[1].write_bytes(damaged)
    again, broken, said = another_process(cache)
    assert again == values
    assert broken["compiled"] == 2 and broken["cached"] == warm["cached"] - 2
    assert said.count("Error reading persistent compilation cache entry for 'jit_loop'") == 2


@pytest.fixture
def account():
    compilation.start(None)
    yield
    compilation.start(None)


def test_a_program_is_counted_and_told_of_once_for_each_shape(account, monkeypatch, capsys):
    monkeypatch.setattr(compilation, "LINE_SECONDS", 0.0)
    program = jax.jit(lambda x: x + 1)
    for length in (2, 3, 2):
        with compilation.compiling(f"{length}"):
            program(jax.numpy.arange(length) * 1.0)
    program(jax.numpy.arange(4) * 1.0)
    ours = [p for p in compilation.report()["programs"] if "lambda" in p["program"]]
    assert [p["shape"] for p in ours] == ["2", "3"]
    told = re.findall(r"compiled in \d+\.\d s: (\d)\n", capsys.readouterr().err)
    assert {"2", "3"} <= set(told)
    assert compilation.report()["compiled"] > 2
    compilation.start(None)
    assert compilation.report() == {"seconds": 0, "cached": 0, "compiled": 0, "programs": []}
