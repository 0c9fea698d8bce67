"""How many threads this process may use, as cgroup limits and other local processes leave it."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path

# Whoever sets one of these decides on torch's threads, or on where they run, which hides the cores of this process.
_NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_PLACES = ("OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def budget() -> int | None:
    """Return how many threads a step may use: its share of the CPUs; None if the environment sets the number."""
    if any(name in os.environ for name in _NUMBERS + _PLACES):
        return None
    ranks = local_ranks()
    usable, in_group, quota = cpus()
    # A launcher that binds each process to CPUs of its own has shared them out already.
    share = usable / ranks if usable == in_group else usable
    return max(1, int(min(share, quota / ranks)))


def local_ranks() -> int:
    """Return how many processes of this job share the machine, as torchrun tells each; 1 if nobody says."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(told)) if told.isdecimal() else 1


@functools.cache
def cpus(system: Path = Path("/")) -> tuple[int, int, float]:
    """Return on how many CPUs this process, and its whole cgroup, may run, and the time of how many the cgroup has."""
    in_group, quota = os.cpu_count() or 1, math.inf
    for folder in cgroups(system):
        quota = min(quota, _quota(folder))
        names = ("cpuset.cpus.effective", "cpuset.effective_cpus")
        in_group = min([in_group, *(_counted(text) for text in map(_read, (folder / name for name in names)) if text)])
    return usable_cpus(), in_group, quota


def usable_cpus() -> int:
    """Return on how many CPUs this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cgroups(system: Path) -> list[Path]:
    """Return the folders of this process's cgroups (version 2 and 1) and of all that they are in."""
    folders = []
    for line in _read(system / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        root = system / "sys/fs/cgroup" / controllers
        inner = root / path.lstrip("/")
        folders += [inner, *(folder for folder in inner.parents if folder.is_relative_to(root))]
    return folders


def _quota(folder: Path) -> float:
    """Return how many CPUs' time a cgroup may use at most."""
    limit, _, period = _read(folder / "cpu.max").partition(" ")
    if not limit:
        limit, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return int(limit) / int(period) if limit.isdecimal() and period.isdecimal() else math.inf


def _counted(ranges: str) -> int:
    """Return how many CPUs a list such as ``0-3,8`` has."""
    ends = [part.split("-") for part in ranges.split(",")]
    return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
