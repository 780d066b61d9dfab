"""`stepwiser doctor`: each failure that it can find, made for real or at the machine's boundary."""

import http.server
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from stepwiser_jax.__main__ import main
from stepwiser_jax.commands import doctor
from stepwiser_jax.distributed import mesh


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def findings(capsys, status=0):
    assert main(["doctor", "--json"]) == status
    return {found["check"]: found for found in json.loads(capsys.readouterr().out)}


def test_a_healthy_machine(offline, capsys):
    found = findings(capsys)
    assert {x["state"] for x in found.values()} == {"ok", "note"}
    assert found["hub"]["found"] == "HF_HUB_OFFLINE is set: only what is in the cache"
    assert found["devices"]["found"] == "8 x cpu (cpu)"
    assert found["mesh"]["found"] == "fsdp 8: a sum over all devices"
    assert "-> unset HF_HUB_OFFLINE" not in json.dumps(found)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("✓ python") and any("-> unset HF_HUB_OFFLINE" in x for x in lines)


def test_a_package_that_is_missing(offline, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("jax", "no-such-package"))
    monkeypatch.setattr(doctor, "VOCABULARIES", ("no-such-package",))
    found = findings(capsys, status=1)
    assert found["jax"]["state"] == "ok"
    assert found["no-such-package"]["state"] == "broken"
    assert found["no-such-package"]["fix"] == "pip install no-such-package"
    assert found["tokenizer.model"]["state"] == "note"


@pytest.mark.parametrize(
    ("asked", "state", "fix"),
    [(None, "broken", "pip install '.[cuda]'"), ("cpu", "note", "unset JAX_PLATFORMS")],
)
def test_a_gpu_that_jax_does_not_use(offline, capsys, monkeypatch, tmp_path, asked, state, fix):
    driver = tmp_path / "version"
    driver.touch()
    _, shown, how = doctor.ACCELERATORS["gpu"]
    monkeypatch.setitem(doctor.ACCELERATORS, "gpu", ((str(driver),), shown, how))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if asked:
        monkeypatch.setenv("JAX_PLATFORMS", asked)
    found = findings(capsys, status=int(state == "broken"))["gpu"]
    assert found["state"] == state and fix in found["fix"]
    assert "the machine has an NVIDIA driver, but jax uses the cpu" in found["found"]


def test_a_sum_that_is_wrong_and_a_check_that_raises(offline, capsys, monkeypatch):
    shard_batch = mesh.shard_batch
    monkeypatch.setattr(mesh, "shard_batch", lambda x, on: shard_batch(np.zeros_like(x), on))

    def host():
        raise OSError("no such sysconf")
        yield

    monkeypatch.setattr(doctor, "host", host)
    found = findings(capsys, status=1)
    assert found["mesh"]["found"] == "fsdp 8: a sum over all devices gives 0.0, expected 36.0"
    assert found["host"]["found"] == "OSError: no such sysconf"
    assert found["disk"]["state"] == "ok"


def test_a_directory_that_cannot_be_written():
    (found,) = doctor.disk(Path("/proc"))
    assert found.state == "broken" and "--run-dir" in (found.fix or "")


class Answers(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_hub_that_answers_and_one_that_does_not(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        (there,) = doctor.hub()
        server.shutdown()
    (gone,) = doctor.hub()
    assert there.state == "ok" and there.found.endswith(("with a token", "without a token"))
    assert gone.state == "note" and "does not answer" in gone.found and gone.fix
