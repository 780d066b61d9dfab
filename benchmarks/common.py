"""What the benchmarks share: workloads, clocks, the machine's limits, sides that take turns.

A side is a process that reads the name of a workload from a line and answers with a line
of JSON. It may run in another interpreter, which may have the standard library alone, so nothing
else is imported at the top.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
WORKLOAD = json.loads((FOLDER / "workload.json").read_text())


# --- workloads ----------------------------------------------------------------------------------


def requests(name: str) -> tuple[list[tuple[list[int], list[int], int]], int]:
    """Returns [(token ids, lengths of the prefixes to continue, samples of each)], new tokens."""
    prompts = WORKLOAD["prompts"]
    if name == "mc":
        mc = WORKLOAD["mc"]
        prompt = mc["prompt"]
        cuts = [len(prompt) + boundary for boundary in mc["boundaries"]]
        return [(prompt + mc["response"], cuts, mc["rollouts"])], mc["new_tokens"]
    if name == "group":
        group = WORKLOAD["group"]
        chosen, samples = prompts[: group["prompts"]], group["samples"]
    else:
        chosen, samples = prompts[: int(name[1:])], 1
    return [(prompt, [len(prompt)], samples) for prompt in chosen], WORKLOAD["new_tokens"]


def num_tokens(name: str) -> int:
    some, new = requests(name)
    return sum(len(cuts) * samples for _, cuts, samples in some) * new


def random_completions() -> list[list[list[int]]]:
    """Returns token ids of `train`'s completions, by prompt and sample, equal in all processes."""
    train, draw = WORKLOAD["train"], random.Random(0)
    return [
        [
            [draw.randrange(100, 40_000) for _ in range(train["completion_len"])]
            for _ in range(train["samples"])
        ]
        for _ in range(train["prompts"])
    ]


# --- clocks and limits --------------------------------------------------------------------------


def core_seconds(function: Callable[[], Any]) -> float:
    """Returns user and system time of this process: another process on the core adds nothing."""
    start = time.process_time()
    function()
    return time.process_time() - start


def reset_peak() -> None:
    """Starts to count peak memory from here."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def compilations() -> list[str]:
    """Returns a list that grows by one with every program XLA compiles from now on."""
    import jax

    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    return compiled


def finished_quickstart(text: str) -> Path:
    """Returns an argument of the command line: the directory of a finished quickstart."""
    if not (Path(text) / "summary.json").is_file():
        raise argparse.ArgumentTypeError(f"expected a finished quickstart at {text}, found none")
    return Path(text)


def ceilings() -> dict[str, float]:
    """Returns FLOP/s of a bfloat16 matrix product (oneDNN), and bytes/s of a sum over 1 GiB."""
    import torch

    torch.set_num_threads(1)
    a = torch.randn(2048, 2048).to(torch.bfloat16)
    x = torch.ones(1 << 28)

    def best(function: Callable[[], Any]) -> float:
        function()
        return min(core_seconds(function) for _ in range(5))

    return {"flops": 2 * 2048**3 / best(lambda: a @ a), "bandwidth": x.nbytes / best(x.sum)}


# --- the floor of sampling ----------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that the floor depends on; `body` and `head` count parameters."""

    layers: int
    width: int
    kv_width: int
    body: int
    head: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Sizes:
        """Reads the fields of a config.json."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        width, kv_width = heads * head_dim, config["num_key_value_heads"] * head_dim
        layers = config["num_hidden_layers"]
        layer = hidden * (2 * width + 2 * kv_width + 3 * config["intermediate_size"])
        return cls(layers, width, kv_width, layers * layer, hidden * config["vocab_size"])


def read_sizes(model_dir: str) -> Sizes:
    return Sizes.of(json.loads((Path(model_dir) / "config.json").read_text()))


SampledTrunk = tuple[int, list[tuple[int, int]]]
"""Tokens stored, and of each row that goes on from them: (length of its prefix, tokens sampled)."""


def sampling_floor(
    sizes: Sizes, trunks: Sequence[SampledTrunk], rows: int, *, flops: float, bandwidth: float
) -> float:
    """Returns the least seconds in bfloat16 for sampling with `rows` rows at a time.

    Reading a prefix gives the first token of each of its rows. Every further step reads the weights
    and every distinct key and value once, at full bandwidth, while all products run at the rate of
    a large square one.
    """
    parameters, kv_bytes = sizes.body + sizes.head, 2 * 2 * sizes.layers * sizes.kv_width
    read_flops = step_flops = kv_read = 0.0
    all_steps, longest = 0, 0
    for stored, forks in trunks:
        read_flops += stored * (2 * sizes.body + 2 * sizes.layers * sizes.width * stored)
        steps = [max(0, tokens - 1) for _, tokens in forks]
        for count, (prefix, tokens) in zip(steps, forks, strict=True):
            context = prefix + tokens / 2
            step_flops += count * (2 * parameters + 4 * sizes.layers * sizes.width * context)
            kv_read += count * tokens / 2 * kv_bytes
        kv_read += max([sum(steps) / rows, *steps]) * stored * kv_bytes
        all_steps, longest = all_steps + sum(steps), max([longest, *steps])
    step_bytes = max(longest, all_steps / rows) * 2 * parameters + kv_read
    return read_flops / flops + max(step_flops / flops, step_bytes / bandwidth)


# --- a side, from within ------------------------------------------------------------------------


def serve(run: Callable[[str], dict[str, Any]], *, warm_up: bool = True) -> None:
    """Runs every workload whose name comes in; what `run` returns goes back with seconds and peak
    memory. With `warm_up` the first run of each is not measured: it compiles."""
    print(json.dumps({"ready": True}), flush=True)
    warm = set()
    for line in sys.stdin:
        name = line.strip()
        if warm_up and name not in warm:
            run(name)
            warm.add(name)
        found: dict[str, Any] = {}
        reset_peak()
        found["seconds"] = core_seconds(lambda n=name, f=found: f.update(run(n)))
        found["peak_mib"] = peak_mib()
        print(json.dumps(found), flush=True)


# --- sides, from without ------------------------------------------------------------------------


class SideEnded(Exception):
    """The process of a side has ended; the message says what it last wrote."""


class Side:
    """A child process pinned to `core`. What else it prints does not matter."""

    def __init__(self, name: str, command: Sequence[str], core: int):
        path = [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(path),
        }
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the side is
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {core})  # inherited
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            errors="replace",
            env=environment,
        )
        os.sched_setaffinity(0, before)
        self._ready = False

    def run(self, workload: str) -> dict[str, Any]:
        """Returns what the side answers. Raises SideEnded."""
        if not self._ready:
            self._answer("ready")
            self._ready = True
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(workload + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # _answer finds that it has ended
        return self._answer("seconds")

    def _answer(self, key: str) -> dict[str, Any]:
        """Returns the next line that is a JSON object with this key."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                try:
                    found = json.loads(line)
                except ValueError:
                    continue
                if key in found:
                    return found
        status = self._process.wait()
        self._errors.seek(0)
        last = "".join(self._errors.readlines()[-12:]).rstrip()
        raise SideEnded(f"{self.name} ended with status {status}; its last lines:\n{last}")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def rival_of(names: Iterable[str]) -> Callable[[str], tuple[str, str]]:
    """Returns what reads NAME=PYTHON from a command line."""

    def rival(text: str) -> tuple[str, str]:
        name, _, python = text.partition("=")
        if name not in names or not os.access(python, os.X_OK):
            raise argparse.ArgumentTypeError(
                f"expected one of {', '.join(names)}, then = and its interpreter; found {text!r}"
            )
        return name, python

    return rival


def take_turns(
    sides: dict[str, Side], workload: str, repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """Returns `repeats` answers of every side. Reports a side that ends, and drops it."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in list(sides.items()):
            try:
                runs[name].append(side.run(workload))
            except SideEnded as error:
                print(f"\n{workload}: {error}\n", file=sys.stderr, flush=True)
                del sides[name], runs[name]
    return runs


def summaries(
    workload: str, runs: dict[str, list[dict[str, Any]]], tokens: int, floor: float
) -> list[dict[str, Any]]:
    """Returns one row per side: medians, share of the floor, and how much faster `ours` is.

    `tokens` are those of a run, unless it says how many it sampled, and those of the floor.
    """
    rates = {
        name: statistics.median(run.get("tokens", tokens) / run["seconds"] for run in some)
        for name, some in runs.items()
    }
    return [
        {
            "workload": workload,
            "side": name,
            "seconds": statistics.median(run["seconds"] for run in some),
            "runs": [run["seconds"] for run in some],
            "tokens_per_second": rates[name],
            "share_of_floor": rates[name] * floor / tokens,
            "peak_mib": max(run["peak_mib"] for run in some),
            "ratio": rates["ours"] / rates[name] if "ours" in rates else None,
            "compilations_after_warm_up": sum(run.get("compilations", 0) for run in some),
        }
        for name, some in runs.items()
    ]


# --- tables -------------------------------------------------------------------------------------


def print_header(*names: str) -> None:
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|", flush=True)


def print_row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


SUMMARY_COLUMNS = (
    "workload", "side", "core seconds", "tokens/s", "of the floor", "peak MiB", "beside ours"
)  # fmt: skip


def print_summary(row: dict[str, Any]) -> None:
    print_row(
        row["workload"],
        row["side"],
        f"{row['seconds']:.2f}",
        f"{row['tokens_per_second']:.0f}",
        f"{row['share_of_floor']:.0%}",
        f"{row['peak_mib']:.0f}",
        "" if row["ratio"] is None else f"{row['ratio']:.1f}x",
    )


def write_json(path: str | None, content: Any) -> None:
    if path:
        Path(path).write_text(json.dumps(content, indent=2) + "\n")
