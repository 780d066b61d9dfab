"""An experiment tracker gets what metrics.jsonl gets, and no failure of it ends a run."""

import json
import sys
import types

import pytest

from stepwiser_jax.errors import UserError
from stepwiser_jax.runs.metrics import Metrics
from stepwiser_jax.runs.tracker import Tracker


class Module(types.ModuleType):
    """A tracker that remembers its calls, with wandb's names of arguments."""

    def __init__(self, fails=""):
        super().__init__("mytracker")
        self.calls, self.fails = [], fails

        def init(project=None, name=None, config=None, id=None, resume=None, dir=None):
            given = {"project": project, "name": name, "config": config, "id": id}
            self.note("init", given | {"resume": resume})

        def log(data, step=None):
            self.note("log", data, step)

        def finish():
            self.note("finish")

        self.init, self.log, self.finish = init, log, finish

    def note(self, *call):
        self.calls.append(call)
        if call[0] == self.fails:
            raise ConnectionError("no route")


@pytest.fixture
def use(monkeypatch):
    def use(module):
        monkeypatch.setitem(sys.modules, "mytracker", module)
        monkeypatch.setenv("STEPWISER_TRACKER", "mytracker")
        return module

    return use


def test_it_gets_what_the_metrics_get_and_goes_on_after_a_restart(use, tmp_path):
    tracker, run_dir = use(Module()), tmp_path / "judge"
    run_dir.mkdir()
    settings = {"seed": 3, "training": {"optimizer": {"learning_rate": 0.1}}}
    for step in (1, 2):
        metrics = Metrics(run_dir, settings)
        metrics.resume_at(step - 1)
        metrics.write(step, {"reward": step / 4})
        metrics.close()
    (_, first), one, end, (_, again), two, _ = tracker.calls
    assert first == again
    assert (first["project"], first["name"], first["resume"]) == ("stepwiser", "judge", "allow")
    assert first["config"] == settings and len(first["id"]) == 16
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for (name, values, step), line in zip((one, two), lines, strict=True):
        assert (name, step, values["reward"]) == ("log", line["step"], line["reward"])
    assert end == ("finish",)


def test_arguments_that_a_tracker_does_not_take_are_left_out(use, tmp_path):
    tracker, given = use(Module()), {}
    tracker.init = lambda project, config: given.update(project=project, config=config)
    Tracker(tmp_path, {"seed": 1})
    assert given == {"project": "stepwiser", "config": {"seed": 1}}


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_told_of_once_and_no_run_ends(use, tmp_path, capsys, fails):
    tracker = use(Module(fails))
    metrics = Metrics(tmp_path, {})
    for step in (1, 2):
        metrics.write(step, {"loss": 1.0})
    metrics.close()
    assert capsys.readouterr().err.count("mytracker fails (ConnectionError: no route)") == 1
    assert [call[0] for call in tracker.calls][-1] == fails
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_tracker_that_is_none_is_a_mistake(use, tmp_path, monkeypatch):
    incomplete = use(Module())
    del incomplete.log
    with pytest.raises(UserError, match="init, log and finish, found mytracker without log"):
        Tracker(tmp_path, {})
    monkeypatch.setenv("STEPWISER_TRACKER", "no_such_tracker")
    with pytest.raises(UserError, match=r"found no_such_tracker .*unset STEPWISER_TRACKER"):
        Tracker(tmp_path, {})
    monkeypatch.delenv("STEPWISER_TRACKER")
    Tracker(tmp_path, {}).log(1, {})
