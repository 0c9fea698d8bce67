"""``lucid info``: which engines run on this machine, and why the others do not."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from rich.text import Text
from tqdm import tqdm

import lucid
from lucid.bench import machine
from lucid.bench.contenders import BYTES_MOVED, Copy, Step, bus_copies, mover
from lucid.bench.paired import Quartiles, sampler
from lucid.engine import cpu, cuda, threads

from . import output

_ELEMENTS = 2**26  # 1 GiB in the four streams of a step: larger than any cache
_BUS_BYTES = 2**28
_HOST_BYTES = 8  # of float32 moments, each way per parameter
_SAMPLES = 15


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine: what it is, and why it does not run here, if so."""

    name: str
    what: str
    missing: str | None


@dataclass(frozen=True, slots=True)
class Info:
    """What `lucid info` reports.

    `threads`: of a large step. `team`: what they are, torch's OpenMP threads ("torch") or our own ("pool"). `limits`:
    GB/s that the CPU and each GPU moved, by name. `bus`: GB/s between pinned memory and each GPU, each way with both
    ways at once. `pinnable_bytes`: the host's free memory, if it can be pinned for ``state_device="cpu"``; otherwise
    `pinnable_missing` says why not.
    """

    engines: list[Engine]
    simd_level: str | None
    simd_levels: list[str]
    threads: int
    threads_reason: str
    team: str | None
    team_reason: str | None
    cpu: str
    devices: list[str]
    memory_bytes: float
    versions: dict[str, str]
    limits: dict[str, float]
    bus: dict[str, float]
    pinnable_bytes: float | None
    pinnable_missing: str | None


def gathered(*, measure: bool = True) -> Info:
    """Return what this machine has; `measure`: with its memory bandwidth, which takes some seconds."""
    found = cpu.missing is None
    unpinnable = _pinnable_missing()
    team, team_reason = cpu.team() if found else (None, None)
    return Info(
        [
            Engine("cpu", "C++, for parameters on a CPU", cpu.missing),
            Engine("cuda", "Triton, for parameters on a CUDA device", _cuda_missing()),
            Engine("reference", "torch operations, slow, for parameters anywhere else", None),
        ],
        cpu.simd_level() if found else None,
        cpu.simd_levels() if found else [],
        cpu.step_threads() if found else torch.get_num_threads(),
        _threads_reason(),
        team,
        team_reason,
        machine.cpu_model(),
        [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        machine.total_memory(),
        _versions(),
        _limits() if measure and found else {},
        _bus() if measure and unpinnable is None else {},
        machine.free_memory() if unpinnable is None else None,
        unpinnable,
    )


def _cuda_missing() -> str | None:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a CPU-only build"
    if cuda.missing is not None:
        return cuda.missing
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def _pinnable_missing() -> str | None:
    """Return why no memory can be pinned; None if it can."""
    if not torch.cuda.is_available():
        return "it needs a CUDA device"
    try:
        torch.empty(1, pin_memory=True)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def _threads_reason() -> str:
    """Return why steps use this number of threads."""
    number, cores = torch.get_num_threads(), machine.cores()
    set_by = next((name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ), None)
    if cpu.missing is None and cpu.step_threads() < number:
        usable, _, quota = threads.cpus()
        limit = f", of which its cgroup limits it to {quota:.3g}" if quota < usable else ""
        reason = (
            f"this process's share of {usable} usable cores{limit}; {threads.local_ranks()} processes of this job run "
            f"on this machine (LOCAL_WORLD_SIZE). torch's kernels use {number}"
        )
        return f"{reason}. OMP_NUM_THREADS or torch.set_num_threads sets another number for both"
    if set_by is not None and os.environ[set_by] == str(number):
        reason = f"{set_by}={number}, which launchers such as torchrun set; {cores} cores are usable"
    elif number == cores:
        reason = "one per core that this process may use"
    else:
        reason = f"torch's choice; {cores} cores are usable"
    return f"{reason}. torch.set_num_threads changes it; a step of fewer than 65,536 elements per thread uses fewer"


def _versions() -> dict[str, str]:
    versions = {
        "lucid-optim": lucid.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    if torch.version.cuda is not None:
        versions["CUDA"] = torch.version.cuda
    if importlib.util.find_spec("triton") is not None:
        versions["triton"] = importlib.metadata.version("triton")
    return versions


def _limits() -> dict[str, float]:
    """Memory bandwidth in GB/s: of moving the bytes of a float32 step on the CPU, or of a device copy."""
    steps: dict[str, tuple[Step, float]] = {"CPU": (mover(_ELEMENTS), BYTES_MOVED * _ELEMENTS)}
    for index in range(torch.cuda.device_count()):
        copy = Copy("copy")
        shapes = [(_ELEMENTS,)]
        steps[f"cuda:{index}"] = copy.make(shapes, f"cuda:{index}"), copy.moved(shapes)
    return _measured(steps, "memory bandwidth")


def _bus() -> dict[str, float]:
    """GB/s between pinned memory and each GPU, each way with both ways at once."""
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return _measured({name: (bus_copies(_BUS_BYTES, torch.device(name)), _BUS_BYTES) for name in names}, "bus")


def _measured(steps: Mapping[str, tuple[Step, float]], what: str) -> dict[str, float]:
    """Return GB/s of each step, given with the bytes that it moves, by the name of its device."""
    speeds = {}
    with tqdm(total=_SAMPLES * len(steps), desc=what, leave=False, disable=None) as bar:
        for name, (step, moved) in steps.items():
            wait = functools.partial(torch.cuda.synchronize, name) if name.startswith("cuda") else (lambda: None)
            sample = sampler(step, warm=False, wait=wait)
            seconds = []
            for _ in range(_SAMPLES):
                seconds.append(sample())
                bar.update()
            speeds[name] = moved / Quartiles.of(seconds).median / 1e9
    return speeds


def run(*, json: bool, measure: bool) -> int:
    """Print the report; return 1 if the reference engine would update parameters on a device of this machine."""
    info = gathered(measure=measure)
    slow = [engine.name for engine in info.engines if engine.missing and (engine.name == "cpu" or info.devices)]
    if json:
        output.print_json(asdict(info))
        return 1 if slow else 0
    console = output.console()
    rows: list[list[str | Text]] = []
    for engine in info.engines:
        style = output.GOOD if engine.missing is None else output.BAD if engine.name in slow else output.FAINT
        state = Text("no" if engine.missing else "yes", style)
        rows.append([engine.name, state, engine.missing or engine.what])
    engines = output.table(["engine", "runs", ""], rows)
    engines.columns[2].justify = "left"
    console.print(engines)
    console.print()
    found: dict[str, str | Text] = {"CPU": info.cpu}
    found |= {f"cuda:{index}": name for index, name in enumerate(info.devices)}
    if info.simd_level is not None:
        found["SIMD level"] = f"{info.simd_level}, of {', '.join(info.simd_levels)}"
    found["threads"] = f"{info.threads}: {info.threads_reason}"
    if info.team is not None:
        team = "torch's OpenMP threads" if info.team == "torch" else "lucid's own, not torch's"
        found["run in"] = f"{team}: {info.team_reason}"
    found["memory"] = output.size(info.memory_bytes)
    for name, limit in info.limits.items():
        what = f"the fastest float32 step takes {BYTES_MOVED / limit:.2g} ns per parameter"
        found[f"limit, {name}"] = f"{output.digits(limit)} GB/s measured: {what}"
    for name, speed in info.bus.items():
        what = f"a step with float32 moments on the host takes {_HOST_BYTES / speed:.2g} ns per parameter at least"
        found[f"bus, {name}"] = f"{output.digits(speed)} GB/s measured, each way with both ways at once: {what}"
    if info.pinnable_bytes is None:
        found["can be pinned"] = f"nothing: {info.pinnable_missing}"
    else:
        size = output.size(info.pinnable_bytes) if math.isfinite(info.pinnable_bytes) else "all"
        found["can be pinned"] = f"{size} that is free"
    console.print(output.facts(found | dict(info.versions)))
    return 1 if slow else 0
