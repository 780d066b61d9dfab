"""The judge and the search method of docs/extending.md, named in a config."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from stepwiser_jax.config_files import load_config
from stepwiser_jax.distributed.mesh import make_mesh
from stepwiser_jax.errors import UserError
from stepwiser_jax.judges.base import Solution
from stepwiser_jax.judges.load import load_judge
from stepwiser_jax.record_io import read_records
from stepwiser_jax.records import SearchResult
from stepwiser_jax.stages import search

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()


@pytest.fixture
def config_of(tmp_path, monkeypatch):
    """Writes the examples' modules; returns a function that makes the config which names them."""
    monkeypatch.syspath_prepend(tmp_path)
    settings = {}
    for section in ("A judge", "A search method"):
        (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
        (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
        (named,) = re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)
        file = tmp_path / code.split()[1]
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
        settings |= yaml.safe_load(named)
    settings |= {
        "policy": {"path": "arithmetic"},
        "problems": {"source": "arithmetic", "split": "dev", "limit": 2},
        "prompt_style": "bare",
        "majority": [1],
        "max_attempts": 2,
        "max_chunk_tokens": 4,
        "sampling": {"max_new_tokens": 8},
        "engine": {"rows": [4], "buckets": [64]},
    }

    def config(**changes):
        file = tmp_path / "search.yaml"
        file.write_text(json.dumps(settings | changes))
        return load_config("search", file)

    yield config
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
        del sys.modules[name]


def test_a_search_with_a_judge_and_a_method_of_ones_own(tmp_path, config_of):
    summary = search.run(config_of(), tmp_path / "run")
    results = read_records(tmp_path / "run", SearchResult)
    methods = {"greedy", "chunk_reset", "keep_accepted", "sample0"}
    assert {result.method for result in results} == methods and len(results) == 2 * len(methods)
    assert "accuracy" in summary["keep_accepted"]


def test_a_judge_of_ones_own_reads_its_settings(config_of):
    judge = load_judge(config_of().judge, mesh=make_mesh(), seed=0)
    (found,) = judge([Solution("s", "q", ["one two", "one two three four", "a"], start=1)])
    assert [judgment.p_positive for judgment in found] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": {"kind": "mypackage.short_chunks:No", "path": "x"}}, "has no 'No'"),
        ({"own": {"x": {"method": "no_such_module:f"}}}, "no module 'no_such_module'"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, config_of, changes, message):
    with pytest.raises(UserError, match=message):
        search.run(config_of(**changes), tmp_path / "run")
