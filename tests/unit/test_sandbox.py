"""Code of a model: what it may do, what it may not, and that nothing it does reaches the parent."""

import copy
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from landlock import needs_landlock
from stepwiser_jax.errors import UserError
from stepwiser_jax.sandbox import confine, runner
from stepwiser_jax.sandbox.runner import Execution, Limits, Sandbox

TIME_OUT = "Code execute time out: Code execution timed out"


pytestmark = needs_landlock


@pytest.fixture(scope="module")
def roomy() -> Sandbox:
    return Sandbox(Limits(seconds=30), workers=2)


@pytest.fixture
def strict(roomy, tmp_path, monkeypatch) -> Sandbox:
    """Little of everything, and scratch folders below `tmp_path`."""
    monkeypatch.setattr(runner.tempfile, "tempdir", str(tmp_path))
    limited = copy.copy(roomy)
    limited.limits = Limits(seconds=2.0, memory_bytes=2**29, scratch_bytes=2**20)
    limited.failures = Counter()
    return limited


# --- what code may do ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, output",
    [
        ("print(1 + 1)", "2"),
        ("", ""),
        ("print('naïve ∫ 𝟙')", "naïve ∫ 𝟙"),
        ("print('\\ud800', 'a\ud800')", "? a?"),
        (
            "import sympy as sp\nx = sp.symbols('x')\nprint(sp.solve(x**2 - 2))",
            "[-sqrt(2), sqrt(2)]",
        ),
        ("import numpy as np\nprint(np.linalg.solve(2 * np.eye(2), [2, 4]))", "[1. 2.]"),
        ("import sympy as sp\nx = sp.symbols('x')\nprint(sp.lambdify(x, x**2, 'numpy')(3))", "9"),
        (
            "import datetime, zoneinfo\nzone = zoneinfo.ZoneInfo('Asia/Tokyo')\n"
            "print(datetime.datetime(2020, 1, 1, tzinfo=zone).utcoffset())",
            "9:00:00",
        ),
        ("open('a', 'w').write('kept')\nprint(open('a').read())", "kept"),
        ("import os\nopen('a', 'w')\nopen('a', 'r+').write('b')\nprint(os.listdir())", "['a']"),
        ("import tempfile\nfile = tempfile.TemporaryFile()\nprint(file.write(b'abc'))", "3"),
        ("def main():\n    print('run')\nif __name__ == '__main__':\n    main()", "run"),
        (
            "import pickle\nclass A:\n    pass\n"
            "print(type(pickle.loads(pickle.dumps(A()))).__name__)",
            "A",
        ),
        ("print('before')\nexit()", "before"),
        (
            "print(end='no line feed')\nimport os, sys\nsys.stdout.flush()\nos._exit(0)",
            "no line feed",
        ),
        ("import sys\nprint('no', file=sys.stderr)", ""),
        ("import time\ntime.sleep(0.01)\nprint(input.__name__)", "input"),
    ],
)
def test_code_that_ends_well(roomy, code, output):
    assert roomy.run([code]) == [Execution(output, None)]


@pytest.mark.parametrize(
    "code, failure, output",
    [
        ("print(1)\n1 / 0", "error", "1\nCode execute Error: ZeroDivisionError: division by zero"),
        ("print(end='1')\nx", "error", "1\nCode execute Error: NameError: name 'x' is not defined"),
        (
            "print(1)\nx = (",
            "error",
            "Code execute Error: SyntaxError: '(' was never closed (<code>, line 2)",
        ),
        ("input()", "error", "Code execute Error: EOFError: EOF when reading a line"),
        ("print(1)\nexit(2)", "error", "1"),
        (
            "class E(Exception):\n    def __str__(self):\n        raise SystemExit(0)\nraise E",
            "error",
            "Code execute Error: E",
        ),
        ("raise KeyboardInterrupt", "error", "Code execute Error: KeyboardInterrupt:"),
        ("import sys\nprint(1)\nsys.stdout.close()\nx = 1 / 0", "error", "1"),
        (
            "print('kept')\nimport ctypes\nctypes.string_at(0)",
            "killed",
            "kept\nCode execute Error: ",
        ),
        ("print('kept')\nimport os\nos.abort()", "killed", "kept\nCode execute Error: "),
        ("import os\nos._exit(70)", "error", ""),
        ("print('kept')\nimport time\ntime.sleep(100)", "time", f"kept\n{TIME_OUT}"),
        ("import os, time\nos.close(1)\ntime.sleep(100)", "time", TIME_OUT),
        ("print('\\0confined\\0fake')\n1 / 0", "error", "fake\n"),
    ],
)
def test_code_that_fails_is_told_so(strict, code, failure, output):
    (execution,) = strict.run([code])
    assert execution.failure == failure
    assert execution.output.startswith(output)
    assert strict.failures == {failure: 1}


def test_calls_run_together_in_order_and_know_nothing_of_one_another(strict):
    first = "import time\ntime.sleep(0.3)\nx = 1\nopen('a', 'w')\nprint('first')"
    executions = strict.run([first, "import os\nprint(os.listdir())", "print(x)"])
    assert [e.failure for e in executions] == [None, None, "error"]
    assert [e.output for e in executions[:2]] == ["first", "[]"]
    assert strict.run([]) == []


def test_what_is_printed_while_nobody_reads_is_kept(strict, monkeypatch):
    monkeypatch.setattr(runner, "_exceeds", lambda *_: time.sleep(0.5))
    code = "print('a')\nimport time\ntime.sleep(0.2)\nprint('b')"
    assert strict.run([code]) == [Execution("a\nb", None)]


def test_the_same_code_prints_the_same(strict):
    draws = "import numpy as np, random\nprint(random.random(), np.random.rand())"
    for code in ("print({*'abcdefgh'})", draws):
        once, again = strict.run([code] * 2)
        assert once == again and once.failure is None


# --- attacks ------------------------------------------------------------------------------------

# Made so that a sandbox that is broken, on purpose or not, does not take the machine along: bombs
# are duds of a few children, which end by themselves, and what is sent to everybody is signal 0.
BOMB = """
import os, time
for _ in range(50):
    if os.fork() == 0:
        time.sleep(3)
        os._exit(0)
"""
STUBBORN_BOMB = """
import os, time
for _ in range(50):
    try:
        if os.fork() == 0:
            time.sleep(3)
            os._exit(0)
    except OSError:
        pass
while True:
    pass
"""
THREADS = """
import threading, time
for _ in range(50):
    threading.Thread(target=time.sleep, args=(3,)).start()
"""
MAPPED = """
import ctypes, os
for i in range(100):
    file = os.open({arguments}, os.O_RDWR | {flags}, 0o600)
    os.write(file, bytes(2**19))
    assert ctypes.CDLL(None).mmap(None, 4096, 1, 1, file, 0) != -1  # holds it without a descriptor
    {then}
    os.close(file)
"""
ATTACKS = {
    "endless loop": ("while True: pass", "time"),
    "fork bomb": (BOMB, "error"),
    "stubborn fork bomb": (STUBBORN_BOMB, "time"),
    "threads": (THREADS, "error"),
    "program": ("import subprocess\nsubprocess.run(['/bin/true'])", "error"),
    "program in its place": ("import os\nos.execv('/bin/true', ['true'])", "error"),
    "10 GB": ("x = bytearray(10 * 2**30)", "memory"),
    "10 GB, piece by piece": (
        "import numpy\nx = []\nwhile True: x.append(numpy.empty(2**23))",
        "memory",
    ),
    "memory of its own file": ("import os\nos.memfd_create('x')", "error"),
    "gigabytes of output": ("while True: print('x' * 2**20)", "output"),
    "gigabytes of output, line by line": ("while True: print('x')", "output"),
    "megabytes in an exception": ("raise Exception('x' * 2**24)", "output"),
    "large file": ("open('x', 'wb').write(bytes(2**21))", "error"),
    "many files": (
        "import os\nfor i in range(10**6): open(str(i), 'wb').write(bytes(2**19))",
        "output",
    ),
    "files that never had a name": (
        MAPPED.format(arguments="'.'", flags="os.O_TMPFILE", then="pass"),
        "error",
    ),
    "files that have lost their name": (
        MAPPED.format(arguments="str(i)", flags="os.O_CREAT", then="os.unlink(str(i))"),
        "output",
    ),
    "files under another's name": (
        MAPPED.format(arguments="str(i)", flags="os.O_CREAT", then="os.rename(str(i), 'x')"),
        "error",
    ),
    "files of which one page is kept": (
        MAPPED.format(arguments="str(i)", flags="os.O_CREAT", then="pass"),
        "output",
    ),
    "many empty files": ("for i in range(10**6): open(str(i), 'w')", "output"),
    "many folders": ("import os\nos.mkdir('x')", "error"),
    "many open files": ("x = [open(str(i), 'w') for i in range(1000)]", "error"),
    "file outside": ("print(open('/etc/passwd').read())", "error"),
    "file of the parent": (
        "import os\nprint(open(f'/proc/{os.getppid()}/environ').read())",
        "error",
    ),
    "socket": ("import socket\nsocket.create_connection(('127.0.0.1', 22))", "error"),
    "unix socket": ("import socket\nsocket.socket(socket.AF_UNIX)", "error"),
    "killing its parent": ("import os\nos.kill(os.getppid(), 9)", "error"),
    "killing everybody": ("import os\nos.kill(-1, 0)", "error"),
    "killing its parent by its pipe": (
        "import fcntl, os\nfcntl.fcntl(1, 10, 9)\nfcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())\n"
        "fcntl.fcntl(1, fcntl.F_SETFL, os.O_ASYNC)",
        "error",
    ),
    "higher limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
        "error",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_end_as_failures_of_their_call(strict, tmp_path, attack):
    code, failure = ATTACKS[attack]
    start = time.monotonic()
    (execution,) = strict.run([code])
    assert execution.failure == failure
    assert strict.failures == {failure: 1}
    assert len(execution.output) < 2**16 + 100
    assert time.monotonic() - start < 10  # two are allowed; machines are busy
    assert not list(tmp_path.iterdir()), "the scratch folder is left behind"
    assert strict.run(["print('goes on')"]) == [Execution("goes on", None)]


def test_nothing_else_can_be_opened(strict, tmp_path):
    """As root too: folders and files, for reading or writing, of the code's own process, the
    parent's and the system's."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    parent = f"/proc/{os.getpid()}"
    read = [
        *("/", "/home", "/root", "/tmp", "/etc", "/var", "/dev", "/dev/shm", "/proc", "/sys"),
        *(str(tmp_path), str(secret), os.getcwd(), __file__, runner.__file__, str(Path.home())),
        *("/etc/passwd", "/etc/hostname", "/dev/zero", "/dev/urandom", "/proc/self/environ"),
        *("/proc/self/mem", "/proc/self/maps", "/proc/cpuinfo", "/proc/1/cmdline", "/proc/1/fd"),
        *(f"{parent}/environ", f"{parent}/cmdline", f"{parent}/mem", f"{parent}/cwd"),
        *(os.path.join(parent, "root", "etc", "passwd"), f"{parent}/fd/0"),
    ]
    written = [
        *(os.__file__, pytest.__file__, confine.__file__, str(secret), str(tmp_path / "new")),
        *("/dev/null", "/dev/shm/new", f"{parent}/oom_score_adj"),
        os.path.join(tempfile.gettempdir(), "new"),
    ]
    code = f"""
import os
modes = os.O_WRONLY, os.O_WRONLY | os.O_CREAT
for paths, flags in ({read}, os.O_RDONLY), *[({written}, mode) for mode in modes]:
    for path in paths:
        try:
            os.open(path, flags)
            print("opened", path, flags)
        except (PermissionError, FileNotFoundError):
            pass
"""
    assert strict.run([code]) == [Execution("", None)]
    assert os.access(os.__file__, os.R_OK) and secret.read_text() == "secret"


def test_what_can_be_read_cannot_be_emptied(strict, tmp_path, monkeypatch):
    """A module of the test's own: where this fails, it is the one that is lost."""
    module = tmp_path / "site-packages" / "module.py"
    module.parent.mkdir()
    module.write_text("x = 1")
    monkeypatch.setattr(runner.sys, "path", [*sys.path, str(module.parent)])
    code = f"""
import os
import module
print(open({str(module)!r}).read())
try:
    os.open({str(module)!r}, os.O_RDONLY | os.O_TRUNC)
except PermissionError:
    print("refused")
"""
    assert strict.run([code]) == [Execution("x = 1\nrefused", None)]
    assert module.read_text() == "x = 1"


def test_nothing_else_can_be_changed(strict, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    before = secret.stat()
    code = f"""
import os
open("mine", "w")
for function, *arguments in (
    (os.truncate, {str(secret)!r}, 0),
    (os.unlink, {str(secret)!r}),
    (os.rename, {str(secret)!r}, "mine"),
    (os.rename, "mine", {str(tmp_path / "new")!r}),
    (os.link, {str(secret)!r}, "linked"),
    (os.symlink, {str(secret)!r}, "linked"),
    (os.mkfifo, "pipe"),
    (os.chmod, {str(secret)!r}, 0o777),
    (os.chown, {str(secret)!r}, 1, 1),
    (os.utime, {str(secret)!r}, (0, 0)),
    (os.setxattr, {str(secret)!r}, "user.x", b"1"),
    (os.mkdir, {str(tmp_path / "new")!r}),
    (os.rmdir, os.getcwd()),
):
    try:
        function(*arguments)
        print(function.__name__)
    except OSError:
        pass
"""
    assert strict.run([code]) == [Execution("unlink", None)], "which seems to succeed"
    assert (secret.stat().st_mode, secret.stat().st_mtime) == (before.st_mode, before.st_mtime)
    assert secret.read_text() == "secret"


def test_the_parent_leaks_nothing(strict, monkeypatch):
    """Neither its environment nor what it has open, nor more of another process than that it is
    there."""
    monkeypatch.setenv("API_KEY", "secret")
    code = """
import os, sys
print(sorted(os.environ), sys.argv)
def is_open(number):
    try:
        return bool(os.fstat(number))
    except OSError:
        return False
print([number for number in range(100) if is_open(number)], os.fstat(0) == os.stat("/dev/null"))
print(os.stat("/proc/1").st_size, os.path.exists("/proc/1/exe"), os.path.islink("/proc/1/exe"))
"""
    (execution,) = strict.run([code])
    names, numbers, process = execution.output.splitlines()
    assert "API_KEY" not in names and names.endswith("['']")
    assert numbers == "[0, 1, 2] True"
    assert process.startswith("0 False")


def test_all_other_system_calls_are_refused(roomy):
    """Of the kernel's own list, and of the one for x32 programs: as if they did not exist."""
    column = 1 + list(confine._ARCHITECTURES).index(platform.machine())
    allowed = {*confine._ALLOWED.split()[column::3]}
    special = (*confine._IGNORED, *confine._OPENING, *confine._ALLOWED_WITH)
    allowed |= {call.split()[column] for call in special}
    allowed |= {"335", "336"}  # of the kernel's probes, never filtered: other callers get SIGILL
    code = f"""
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
for number in range(1024):
    for call in (number, number | 0x40000000):
        if str(call) not in {allowed!r}:
            result = libc.syscall(call, *[ctypes.c_long(-1)] * 6)
            if result != -1 or ctypes.get_errno() != errno.ENOSYS:
                print(call, result, ctypes.get_errno())
"""
    assert roomy.run([code]) == [Execution("", None)]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86")
def test_system_calls_of_32_bits_kill(strict):
    """They have other numbers: 20 is getpid there, and writev here, which is allowed."""
    code = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(b"\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3")  # mov eax, 20; int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
print(ctypes.CFUNCTYPE(ctypes.c_int)(address)())
"""
    (execution,) = strict.run([code])
    assert execution == Execution("Code execute Error: the process was killed", "killed")


def test_a_process_without_capabilities():
    lines = "open('/proc/self/status').read().splitlines()"
    code = (
        "from stepwiser_jax.sandbox import confine; confine.drop_capabilities(); "
        f"print({{line.split()[1] for line in {lines} if line[:6] in ('CapPrm', 'CapEff')}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"{'0000000000000000'}\n"


# --- the parent ---------------------------------------------------------------------------------


def test_a_stopped_parent_leaves_nobody_computing(strict, monkeypatch):
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: 0.0))
    assert strict.run(["while True: pass"]) == [Execution(TIME_OUT, "time")]


def test_a_killed_parent_takes_its_children_with_it(tmp_path):
    code = "import os; open('pid', 'w').write(str(os.getpid()))\nwhile True: pass"
    script = (
        "from stepwiser_jax.sandbox.runner import Limits, Sandbox\n"
        f"Sandbox(Limits(seconds=60)).run([{code!r}])"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment)
    child = _within(30, lambda: "".join(p.read_text() for p in tmp_path.glob("sandbox-*/pid")))
    assert _state(child) not in ("Z", None), "it computes"
    parent.send_signal(signal.SIGKILL)
    assert parent.wait() == -signal.SIGKILL
    assert _within(10, lambda: _state(child) in ("Z", None)), "it is dead"


def _within(seconds, found):
    for _ in range(10 * seconds):
        if result := found():
            return result
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} seconds")


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return None


@pytest.mark.parametrize(
    "present, lacking, reason",
    [
        ("= 444, 445, 446", "= 4444, 445, 446", "Landlock: Function not implemented"),
        ("= 444, 445, 446", "= 444, 4445, 446", "Landlock: Function not implemented"),
        ("= 444, 445, 446", "= 444, 445, 4446", "Landlock: Function not implemented"),
        ("version < 3", "version < 999", "Landlock: its version .* does not control truncation"),
        ("= 1, 4, 22, 38", "= 1001, 4, 22, 38", "death with the parent: Invalid argument"),
        ("= 1, 4, 22, 38", "= 1, 1004, 22, 38", "no core dump: Invalid argument"),
        ("= 1, 4, 22, 38", "= 1, 4, 1022, 38", "seccomp: Invalid argument"),
        ("= 1, 4, 22, 38", "= 1, 4, 22, 1038", "no new privileges: Invalid argument"),
        ("= 0x20080522", "= 1", "capset: Invalid argument"),
        ('"x86_64": 0x', '"i686": 0x', "the system calls of x86_64 are not known"),
    ],
)
def test_what_the_platform_lacks_is_refused(tmp_path, monkeypatch, present, lacking, reason):
    text = Path(confine.__file__).read_text()
    if platform.machine() != "x86_64" and "x86_64" in present:
        pytest.skip("of x86_64")
    assert present in text
    without = tmp_path / "confine.py"
    without.write_text(text.replace(present, lacking))
    monkeypatch.setattr(confine, "__file__", str(without))
    with pytest.raises(UserError, match=f"(?s)cannot be confined on this machine.*{reason}.*Linux"):
        Sandbox()


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(runner.sys, "platform", "darwin")
    with pytest.raises(UserError, match="this is darwin"):
        Sandbox()


def test_a_sandbox_without_sympy_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_packages", lambda: [os.path.dirname(os.__file__)])
    with pytest.raises(UserError, match="No module named 'sympy'; install sympy"):
        Sandbox()


@pytest.mark.parametrize("dies", ["os.kill(os.getpid(), 9)", "time.sleep(100)"])
def test_a_process_that_never_starts_is_a_failure_of_its_call(strict, tmp_path, monkeypatch, dies):
    """As when the system kills what takes its last memory, or has no time for it."""
    script = tmp_path / "confine.py"
    script.write_text(f"import os, time\n{dies}")
    monkeypatch.setattr(confine, "__file__", str(script))
    monkeypatch.setattr(runner, "START_SECONDS", 0.2)
    assert strict.run([""])[0].failure == ("killed" if "kill" in dies else "time")
