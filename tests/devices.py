"""The fake devices that tests run on, and how programs are compiled for them."""

import importlib.metadata
import os

OPTIMIZED = bool(os.environ.get("OPTIMIZED"))
"""Whether programs are compiled as users compile them. By default they are not: most of the time of
a test goes into compiling programs that then run for milliseconds."""


def xla_flags(devices: int) -> str:
    """Returns XLA_FLAGS for a process with this number of CPU devices."""
    flags = [
        f"--xla_force_host_platform_device_count={devices}",
        # By default XLA starts independent operations of a program in any order, collectives too:
        # two CPU devices can then wait for one another in different ones, for ever.
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    ]
    if not OPTIMIZED:
        flags.append("--xla_backend_optimization_level=0")
        # The old emitters, without MLIR, take half the time. XLA aborts if it does not know a
        # flag, so versions that nobody has tried do without.
        major, minor = map(int, importlib.metadata.version("jaxlib").split(".")[:2])
        if (major, minor) <= (0, 10):
            flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)
