"""Time, peak memory and what a machine can do at most, on CPU and CUDA alike.

Time on CUDA is that between two events, behind a buffer large enough to push everything out of the
L2 cache. Peak memory on CUDA is the allocator's own figure. On the CPU it is put together from
the allocations and frees that torch's profiler sees: exact to the byte, and no matter what else the
process holds; scratch space inside BLAS libraries is not in it.
"""

import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

L2_BYTES = 2**28
"""Of the buffer that empties the L2 cache: a few times what any has."""

COPIES = 9
"""Times a rate is measured; the median counts."""

PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "nvidia-cutlass-dsl")


@dataclass(frozen=True)
class Pass:
    """One way to compute something, in two steps that are timed apart and together.

    Args:
        forward: computes something to differentiate.
        backward: differentiates it; None where there is nothing to differentiate.
        ready: run before, and not timed: restores what a pass has overwritten.
    """

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None
    ready: Callable[[], None] = lambda: None

    def __call__(self) -> Any:
        """Run both steps, and return what the last one does."""
        state = self.forward()
        return state if self.backward is None else self.backward(state)


class Clock:
    """Takes the time of a function on a device.

    Args:
        device: where it runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.flushed = torch.empty(L2_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, float]:
        """Return what a function returns, and the milliseconds it took."""
        if not self.cuda:
            start = time.perf_counter()
            result = function()
            return result, 1e3 * (time.perf_counter() - start)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        first.record()
        result = function()
        last.record()
        torch.cuda.synchronize()
        return result, first.elapsed_time(last)


def interleaved(
    passes: Mapping[str, Pass], rounds: int, clock: Clock
) -> dict[str, dict[str, float]]:
    """Time all passes in turn, round after round: a slow minute of the machine slows them all.

    Args:
        passes: by name, warmed up.
        rounds: times each is run.
        clock: of the device.

    Returns:
        by name the median milliseconds of "forward", "backward" and "both".
    """
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in passes}
    for _ in range(rounds):
        for name, one in passes.items():
            taken[name].append(_timed(one, clock))
    return {
        name: {step: median(figures[step] for figures in each) for step in each[0]}
        for name, each in taken.items()
    }


def _timed(one: Pass, clock: Clock) -> dict[str, float]:
    one.ready()
    state, forward = clock(one.forward)
    if one.backward is None:
        return {"forward": forward}
    backward = one.backward
    gradients, behind = clock(lambda: backward(state))
    del state, gradients
    both = forward + behind
    if clock.cuda:  # on the CPU the one follows on the other; here the cache was emptied between
        one.ready()
        _, both = clock(one)
    return {"forward": forward, "backward": behind, "both": both}


def peak_memory(function: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """Return what a function returns, and the most bytes it held beyond what was there before.

    Args:
        function: to run, warmed up.
        device: whose memory.
    """
    if device.type != "cuda":
        return _peak_on_cpu(function)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(function: Callable[[], Any]) -> tuple[Any, int]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would say when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = function()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return result, most


def rates(device: torch.device, clock: Clock, small: bool = False) -> dict[str, float]:
    """Measure what no program on a device gets beyond.

    Args:
        device: which.
        clock: of it.
        small: True for a quick look at sizes that do not fill it.

    Returns:
        "copy", bytes read plus bytes written in a millisecond, and "matmul", floating-point
        operations in a millisecond: bfloat16 on CUDA, float32 on the CPU.
    """
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    side, length = (8192, 2**32) if cuda else (2048, 2**28)
    if small:
        side, length = 256, 2**20
    a, b, c = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    matmul = _fastest(lambda: torch.mm(a, b, out=c), clock)
    source = torch.randn(length // 4, device=device)
    target = torch.empty_like(source)
    copy = _fastest(lambda: target.copy_(source), clock)
    return {"copy": 2 * length / copy, "matmul": 2 * side**3 / matmul}


def _fastest(function: Callable[[], Any], clock: Clock) -> float:
    for _ in range(2):
        function()
    return median(clock(function)[1] for _ in range(COPIES))


def nbytes(tensors: tuple[Tensor, ...]) -> int:
    """Return the bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def describe(device: torch.device) -> dict[str, Any]:
    """Say what a device is, without saying whose.

    Args:
        device: which.

    Returns:
        "slug" for file names and marks, "name", and what else is known.
    """
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        slug = re.sub(r"[^a-z0-9]+", "-", found.name.lower()).strip("-")
        memory = round(found.total_memory / 2**30)
        return {"slug": slug, "name": found.name, "memory_gib": memory, "type": "cuda"}
    cores = os.cpu_count()
    instructions = torch.backends.cpu.get_cpu_capability()
    found = {**_processor(), "instructions": instructions, "cores": cores}
    return {"slug": "cpu", **found, "type": "cpu"}


def _processor() -> dict[str, str]:
    known = {"vendor": "vendor_id", "model": "model name", "family": "cpu family"}
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return {"name": platform.processor() or platform.machine()}
    pairs = [line.split(":", 1) for line in file.read_text().splitlines() if ":" in line]
    lines = {key.strip(): value.strip() for key, value in pairs}
    found = {name: lines[key] for name, key in known.items() if key in lines}
    return {"name": found.get("model", platform.machine()), **found}


def versions() -> dict[str, str | None]:
    """Return the versions of what takes part; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {**found, "cuda": torch.version.cuda}


def pathless(text: str) -> str:
    """Return a text without paths of this machine, as far as they can be told, and not too long."""
    return re.sub(r"\S*/\S+", "…", text)[:200]


def resident() -> int:
    """Return the bytes of memory this process has now; its peak where the system does not say."""
    return _status("VmRSS") or peak_resident()


def peak_resident() -> int:
    """Return the most bytes of memory this process has had, since `forget_peak` if that worked.

    Linux's own figure: `getrusage` counts what the parent had before the process was its own.
    """
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status("VmHWM") or own * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> bool:
    """Let the peak begin anew, at what there is now; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    file = Path("/proc/self/status")
    text = file.read_text() if file.exists() else ""
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return None if found is None else 1024 * int(found[1])
