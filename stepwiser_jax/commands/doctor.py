"""Says what this machine has for training and sampling, and how to mend what is missing.

A check is fine, broken, or a note: broken is what a run on these devices would need.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

PACKAGES = (
    *("stepwiser-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"),
    *("transformers", "datasets", "grain"),
)
VOCABULARIES = ("sentencepiece", "tensorflow-text")
"""Either of them reads a vocabulary that is a tokenizer.model."""

HUB_SECONDS = 5.0

ACCELERATORS = {
    "gpu": (
        ("/proc/driver/nvidia/version", "/dev/nvidia0"),
        "an NVIDIA driver",
        "pip install '.[cuda]' in this environment",
    ),
    "tpu": (
        ("/dev/accel0", "/dev/vfio/0"),
        "a TPU",
        "pip install '.[tpu]' in this environment, and end other processes that hold the TPU",
    ),
}
"""For each platform: files that show its hardware, what they show, how jax comes to use it."""


@dataclass(frozen=True)
class Finding:
    """What a check found. `fix` is a command, or what else to do."""

    check: str
    state: Literal["ok", "broken", "note"]
    found: str
    fix: str | None = None


MARKS = {"ok": "✓", "broken": "✗", "note": "–"}


def examine(directory: Path) -> Iterator[Finding]:
    """Yields what each check finds. Runs write to `directory`."""
    for check in (versions, vocabularies, hardware, devices, computing, collective, host, hub):
        try:
            yield from check()
        except Exception as error:  # the checks after it are wanted all the more
            yield Finding(check.__name__, "broken", f"{type(error).__name__}: {error}")
    yield from disk(directory)


def versions() -> Iterator[Finding]:
    yield Finding("python", "ok", sys.version.split()[0])
    for package in PACKAGES:
        version = version_of(package)
        if version is None:
            yield Finding(package, "broken", "not installed", f"pip install {package}")
        else:
            yield Finding(package, "ok", version)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def vocabularies() -> Iterator[Finding]:
    found = {name: version for name in VOCABULARIES if (version := version_of(name))}
    if found:
        text = ", ".join(f"{name} {version}" for name, version in found.items())
        yield Finding("tokenizer.model", "ok", text)
    else:
        text = "models with a tokenizer.model and no tokenizer.json cannot be read"
        yield Finding("tokenizer.model", "note", text, "pip install sentencepiece")


def hardware() -> Iterator[Finding]:
    """Finds accelerators that jax does not use."""
    import jax

    used = jax.default_backend()
    for platform, (files, shown, fix) in ACCELERATORS.items():
        if platform != used and any(map(os.path.exists, files)):
            text = f"the machine has {shown}, but jax uses the {used}"
            asked = os.environ.get("JAX_PLATFORMS")
            if asked and platform not in asked and not (platform == "gpu" and "cuda" in asked):
                yield Finding(
                    platform, "note", f"{text}: JAX_PLATFORMS is {asked}", "unset JAX_PLATFORMS"
                )
            else:
                yield Finding(platform, "broken", text, fix)


def devices() -> Iterator[Finding]:
    import jax

    here, everywhere = jax.local_devices(), jax.devices()
    kinds = sorted({device.device_kind for device in everywhere})
    text = f"{len(everywhere)} x {', '.join(kinds)} ({here[0].platform})"
    if jax.process_count() > 1:
        text += f", {len(here)} of this process, {jax.process_count()} processes"
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in here]
    if all(limits):
        text += f", {min(x for x in limits if x) / 2**30:.1f} GiB each"
    yield Finding("devices", "ok", text)


def computing() -> Iterator[Finding]:
    """Compiles and runs a small program on one device."""
    import jax
    import jax.numpy as jnp

    began = time.perf_counter()
    product = jax.jit(lambda x: x @ x)(jnp.full((64, 64), 0.5))
    text = f"a product of matrices, compiled and run in {time.perf_counter() - began:.2f} s"
    if abs(float(product[0, 0]) - 16) > 1e-2:
        yield Finding("compute", "broken", f"{text}: expected 16, found {float(product[0, 0])}")
    else:
        yield Finding("compute", "ok", text)


def collective() -> Iterator[Finding]:
    """Adds one number of each device, over the mesh that spans all of them."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from stepwiser_jax.distributed.mesh import make_mesh, shard_batch

    count = jax.device_count()
    mesh = make_mesh(fsdp=count)
    numbers = shard_batch(np.arange(1, count + 1, dtype=np.float32), mesh)
    with jax.set_mesh(mesh):
        total = float(jax.jit(jnp.sum)(numbers))
    text = f"fsdp {count}: a sum over all devices"
    if total != count * (count + 1) / 2:
        text += f" gives {total}, expected {count * (count + 1) / 2}"
        yield Finding("mesh", "broken", text)
    else:
        yield Finding("mesh", "ok", text)


def host() -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("host", "ok", f"{cores} cores, {memory:.1f} GiB of memory")


def hub() -> Iterator[Finding]:
    """Asks whether models and data sets can be fetched by their ids."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        fix = "unset HF_HUB_OFFLINE to fetch others"
        yield Finding("hub", "note", "HF_HUB_OFFLINE is set: only what is in the cache", fix)
        return
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            pass
    except (OSError, ValueError) as error:
        fix = "name directories and files in place of ids, or set HF_ENDPOINT to a mirror"
        yield Finding("hub", "note", f"{address} does not answer ({error})", fix)
        return
    token = "with a token" if _has_token() else "without a token"
    yield Finding("hub", "ok", f"{address} answers, {token}")


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def disk(directory: Path) -> Iterator[Finding]:
    free = f"{shutil.disk_usage(directory).free / 2**30:.1f} GiB free in {directory}"
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"0" * 4096)
    except OSError as error:
        fix = "name a --run-dir that you can write to"
        yield Finding("disk", "broken", f"{free}, but it cannot be written: {error}", fix)
        return
    yield Finding("disk", "ok", free)


def run_doctor(say: Callable[[str], None], *, as_json: bool) -> int:
    """Prints what the checks find, one after another. Returns 1 if something is broken, else 0."""
    findings = []
    for finding in examine(Path.cwd()):
        findings.append(finding)
        if not as_json:
            say(f"{MARKS[finding.state]} {finding.check:16} {finding.found}")
            if finding.fix is not None:
                say(f"{'':18} -> {finding.fix}")
    if as_json:
        say(json.dumps([asdict(finding) for finding in findings], indent=2))
    return int(any(finding.state == "broken" for finding in findings))
