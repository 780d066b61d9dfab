"""A judge and a search method of a user's own, named in a config: no file of ours is touched."""

import json

import pytest

from stepwiser_jax.config import load_config
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.judges.base import Solution
from stepwiser_jax.judges.load import load_judge
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import SearchResult
from stepwiser_jax.stages import search

JUDGE = {"kind": "stand_in_search:ShortChunks", "path": "mine", "args": {"words": 3}}


def config_of(tmp_path, **changes):
    tree = {
        "policy": {"path": "arithmetic"},
        "problems": {"source": "arithmetic", "split": "dev", "limit": 2},
        "judge": JUDGE,
        "own": {
            "drop_rejected": {
                "method": "stand_in_search:drop_rejected",
                "args": {"keep": 2},
                "beams": 2,
            }
        },
        "prompt_style": "bare",
        "majority": [1],
        "max_attempts": 2,
        "max_chunk_tokens": 4,
        "sampling": {"max_new_tokens": 8},
        "engine": {"rows": [4], "buckets": [64]},
    }
    file = tmp_path / "search.yaml"
    file.write_text(json.dumps(tree | changes))
    return load_config("search", file)


def test_a_search_with_a_judge_and_a_method_of_ones_own(tmp_path):
    summary = search.run(config_of(tmp_path), tmp_path / "run")
    results = read_records(tmp_path / "run", SearchResult)
    methods = {"greedy", "chunk_reset", "drop_rejected", "sample0"}
    assert {result.method for result in results} == methods and len(results) == 2 * len(methods)
    assert "accuracy" in summary["drop_rejected"]


def test_a_judge_of_ones_own_reads_its_settings(tmp_path):
    judge = load_judge(config_of(tmp_path).judge, mesh=make_mesh(), seed=0)
    (found,) = judge([Solution("s", "q", ["one two", "one two three four", "a"], start=1)])
    assert [judgment.p_positive for judgment in found] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": JUDGE | {"kind": "stand_in_search:Nobody"}}, "has no 'Nobody'"),
        ({"own": {"x": {"method": "no_such_module:f"}}}, "no module 'no_such_module'"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        search.run(config_of(tmp_path, **changes), tmp_path / "run")
