"""Locks the process that runs code of a model. Locks are never undone; if the kernel lacks one of
them, nothing runs.

    python -P -S -B confine.py PARENT MEMORY_BYTES SECONDS FILE_BYTES PACKAGES...   < code

`sandbox.runner` starts this file in the scratch folder; it imports nothing but the standard
library. The locks, for root as well:

- resource limits: address space, CPU time, processes, open files, bytes a file;
- Landlock: files can be opened for reading where the interpreter, its packages and the system's
  libraries are, and in the scratch folder for writing; nowhere else. That folder is flat and only
  grows: code makes files there, but no folders, links or devices, renames none and removes none. A
  file without a name would hold its blocks while nobody can count them;
- seccomp: an allow-list of system calls, those that computing, printing and files need. No socket,
  no process, no thread, no signal to anybody, nothing of other processes. A list of what is
  forbidden would miss what later kernels add;
- no capabilities, no new privileges, no core dump, death together with the parent.

MARK is written when all locks hold and before the first line of the code runs: what comes before it
says why the process refused. What comes after it is the code's own; a second MARK separates what it
printed from the error it ended with.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import os
import resource
import signal
import site
import struct
import sys
import types

MARK = b"\0confined\0"
FAILED, OUT_OF_MEMORY = 1, 3
"""Exit statuses of code that raised. Code that exits with them lies about itself alone."""

LIBRARIES = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"),
    os.path.join(sys.base_prefix, "lib"),
)
"""What else Python and compiled packages may open, if it exists."""

# linux/prctl.h, linux/capability.h
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _SET_NO_NEW_PRIVS = 1, 4, 22, 38
_CAPABILITY_VERSION_3 = 0x20080522

# linux/landlock.h; the numbers of its calls are the same on all processors.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_WRITE_FILE, _READ_FILE, _READ_DIR, _MAKE_REG, _TRUNCATE = (
    *(1 << 1, 1 << 2, 1 << 3, 1 << 8, 1 << 14),
)

# linux/audit.h, and the numbers of the calls that are allowed: on x86_64, on arm64 (- is none).
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ALLOWED = """
read 0 63  write 1 64  readv 19 65  writev 20 66  pread64 17 67  pwrite64 18 68  lseek 8 62
close 3 57  dup 32 23  dup2 33 -  dup3 292 24  ftruncate 77 46
stat 4 -  lstat 6 -  fstat 5 80  newfstatat 262 79  statx 332 291  getdents64 217 61  getcwd 79 17
access 21 -  faccessat 269 48  faccessat2 439 439
mmap 9 222  munmap 11 215  mprotect 10 226  mremap 25 216  madvise 28 233  brk 12 214
futex 202 98  sched_yield 24 124  sched_getaffinity 204 123  getcpu 309 168
getpid 39 172  getppid 110 173  gettid 186 178
getuid 102 174  geteuid 107 175  getgid 104 176  getegid 108 177
clock_gettime 228 113  clock_getres 229 114  clock_nanosleep 230 115  nanosleep 35 101
gettimeofday 96 169  time 201 -  times 100 153  getrusage 98 165  uname 63 160
alarm 37 -  setitimer 38 103  getitimer 36 102
rt_sigaction 13 134  rt_sigprocmask 14 135  rt_sigreturn 15 139  sigaltstack 131 132
restart_syscall 219 128  getrandom 318 278  exit 60 93  exit_group 231 94
"""
# Calls that remove a file seem to succeed and do nothing: Python's temporary files need them.
_IGNORED = ("unlink 87 -", "unlinkat 263 35")
# Calls that open files, each with the place of its flags among the arguments: without O_TMPFILE,
# which makes a file that has no name.
_OPENING = {"open 2 -": 1, "openat 257 56": 2}
_TMPFILE = 0o20000000  # include/uapi/asm-generic/fcntl.h
# Calls of which the second argument decides. Of fcntl, duplicates and flags: others could make the
# kernel send a signal to the parent. Of ioctl, TCGETS (is this a terminal?) and FIOCLEX.
_ALLOWED_WITH = {
    "fcntl 72 25": (0, 1, 2, 3, 1030),
    "ioctl 16 29": (0x5401, 0x5451),
}

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _prctl(option: int, *values: int | ctypes.Array[ctypes.c_char], what: str) -> None:
    # Without a type, ctypes passes an int as 32 bits of a register's 64.
    arguments = [ctypes.c_ulong(v) if isinstance(v, int) else v for v in values]
    padding = [ctypes.c_ulong(0)] * (4 - len(arguments))
    _checked(_libc.prctl(option, *arguments, *padding), what)


def _landlock(number: int, *arguments: int | bytes | None) -> int:
    passed = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *passed), "Landlock")


def limit_resources(memory_bytes: int, seconds: int, file_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # SIGXCPU, then SIGKILL
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # does not bind root


def restrict_files(readable: list[str], scratch: str) -> None:
    """Allows reading of `readable`, and reading and writing of the files in `scratch`, and forbids
    all else that this kernel's Landlock can. Raises OSError before version 3 (Linux
    6.2), in which opening a file for reading could empty it, with O_TRUNC."""
    version = _landlock(_CREATE_RULESET, None, 0, 1)
    if version < 3:
        raise OSError(f"Landlock: its version {version} does not control truncation")
    rights = 15 + (version >= 5)  # on files, one bit each
    network = scopes = 0b11  # bind, connect; abstract sockets, signals
    size = 8 if version < 4 else 16 if version < 6 else 24
    attributes = struct.pack("=QQQ", (1 << rights) - 1, network, scopes)
    ruleset = _landlock(_CREATE_RULESET, attributes[:size], size, 0)
    reading = _READ_FILE | _READ_DIR
    writing = _READ_FILE | _WRITE_FILE | _READ_DIR | _MAKE_REG | _TRUNCATE
    for path in [*readable, scratch]:
        with contextlib.suppress(FileNotFoundError):
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = writing if path == scratch else reading
            if not os.path.isdir(path):
                allowed &= _READ_FILE
            _landlock(_ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, opened), 0)
            os.close(opened)
    _landlock(_RESTRICT_SELF, ruleset, int(version >= 7))  # 1: refusals are not logged
    os.close(ruleset)


def drop_capabilities() -> None:
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(header, bytes(24)), "capset")


def restrict_calls() -> None:
    """Makes calls that are not allowed fail with ENOSYS (seccomp), as on a kernel without them, so
    that the C library falls back to what it knows. Calls of another processor mode (32 bits on
    a kernel of 64) kill; those of x32 have numbers of their own, which are not on the list."""
    column = 1 + list(_ARCHITECTURES).index(os.uname().machine)
    allow, kill, ignore, refuse = 0x7FFF0000, 0x80000000, 0x00050000, 0x00050000 | errno.ENOSYS
    # linux/bpf_common.h. The word at 0 is the call's number, at 4 the architecture, at 16 + 8 * i
    # the lower half of argument i (both processors are little-endian).
    load, equal, has, end = 0x20, 0x15, 0x45, 0x06
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, _ARCHITECTURES[os.uname().machine]),
        (end, 0, 0, kill),
        (load, 0, 0, 0),
    ]
    for number in _ALLOWED.split()[column::3]:
        if number != "-":
            program += [(equal, 0, 1, int(number)), (end, 0, 0, allow)]
    for number in (call.split()[column] for call in _IGNORED):
        if number != "-":
            program += [(equal, 0, 1, int(number)), (end, 0, 0, ignore)]
    for call, place in _OPENING.items():
        if (number := call.split()[column]) != "-":
            program += [(equal, 0, 4, int(number)), (load, 0, 0, 16 + 8 * place)]
            program += [(has, 0, 1, _TMPFILE), (end, 0, 0, refuse), (end, 0, 0, allow)]
    for call, values in _ALLOWED_WITH.items():
        program += [(equal, 0, 2 + 2 * len(values), int(call.split()[column])), (load, 0, 0, 24)]
        for value in values:
            program += [(equal, 0, 1, value), (end, 0, 0, allow)]
        program += [(end, 0, 0, refuse)]
    program += [(end, 0, 0, refuse)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = struct.pack("@HP", len(program), ctypes.addressof(code))
    _prctl(_SET_SECCOMP, 2, ctypes.create_string_buffer(header), what="seccomp")


def confine(
    parent: int, memory_bytes: int, seconds: int, file_bytes: int, packages: list[str]
) -> None:
    """Applies all locks. Raises OSError if the kernel lacks one, or the parent is dead."""
    if os.uname().machine not in _ARCHITECTURES or struct.calcsize("P") != 8:
        raise OSError(f"the system calls of {os.uname().machine} are not known")
    _prctl(_SET_PDEATHSIG, signal.SIGKILL, what="death with the parent")
    if os.getppid() != parent:
        raise ProcessLookupError(f"the parent, {parent}, is dead")
    _prctl(_SET_NO_NEW_PRIVS, 1, what="no new privileges")
    _prctl(_SET_DUMPABLE, 0, what="no core dump")
    limit_resources(memory_bytes, seconds, file_bytes)
    restrict_files([*LIBRARIES, *packages], os.getcwd())
    drop_capabilities()
    restrict_calls()


def _seed(source: str) -> None:
    """Seeds the modules that the code may use, so that it gives the same when it is run again."""
    for module in ("random", "numpy.random"):
        if module.partition(".")[0] in source:
            with contextlib.suppress(ImportError):
                importlib.import_module(module).seed(0)


def _run(source: str) -> int:
    """Runs the code as `__main__`, and returns the exit status. The last line of the output says
    what it raised, in the words that GenPRM's models were trained to read."""
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    status, message = 0, ""
    try:
        _seed(source)
        exec(compile(source, "<code>", "exec"), module.__dict__)
    except SystemExit as end:
        status = FAILED if end.code else 0
    except BaseException as error:
        status = OUT_OF_MEMORY if isinstance(error, MemoryError) else FAILED
        message = f"Code execute Error: {type(error).__name__}"
        with contextlib.suppress(BaseException):  # its text is made by the code
            message += f": {error}"
    with contextlib.suppress(BaseException):  # the code may have closed or replaced it
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(1, MARK + message.encode(errors="replace"))
    return status


def main() -> None:
    parent, memory_bytes, seconds, file_bytes = map(int, sys.argv[1:5])
    packages = sys.argv[5:]
    source = sys.stdin.buffer.read().decode(errors="replace")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    try:
        confine(parent, memory_bytes, seconds, file_bytes, packages)
    except OSError as error:
        raise SystemExit(str(error)) from None
    sys.path[:], sys.argv[:] = packages, [""]
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # pyright: ignore
    site.setquit()
    os.write(1, MARK)
    os.dup2(nothing, 2)
    os.close(nothing)
    os._exit(_run(source))


if __name__ == "__main__":
    main()
