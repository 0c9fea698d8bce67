"""The machine that the measurements ran on."""

from __future__ import annotations

import math
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

import lucid
from lucid.engine import cpu, threads


def description(build: str = lucid.__version__) -> dict[str, str]:
    """Return machine, versions and date, as one readable line each; `build` is the version of lucid-optim."""
    return {
        "CPU": f"{cpu_model()}, {cores()} cores usable, {_caches()}",
        "memory": f"{total_memory() / 2**30:.0f} GiB, transparent huge pages: {_huge_pages()}",
        "system": f"{platform.system()} {platform.release()}, governor: {_governor()}",
        "threads": f"{torch.get_num_threads()}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"lucid-optim {build}, SIMD level {cpu.simd_level()}",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


BUSY = 0.03  # if others take more of all cores' time than this, figures are not reliable


class Neighbours:
    """How much of the machine other processes and the hypervisor take, from here on."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._others = self._others_seconds()

    @staticmethod
    def _others_seconds() -> float:
        """CPU seconds since boot that were not idle and not used by this process or its children."""
        fields = _read(Path("/proc/stat")).partition("\n")[0].split()[1:9]
        if len(fields) < 8:
            return math.nan
        user, nice, system, _idle, _wait, irq, soft_irq, steal = map(int, fields)
        ticks = user + nice + system + irq + soft_irq + steal
        own = os.times()
        return ticks / os.sysconf("SC_CLK_TCK") - sum(own[:4])

    def share(self) -> float:
        """Return their part of all cores' time until now; NaN if the system does not report it."""
        passed = (time.perf_counter() - self._began) * (os.cpu_count() or 1)
        return (self._others_seconds() - self._others) / passed


def total_memory() -> float:
    """Return the machine's memory in bytes; NaN if the system does not report it."""
    if not hasattr(os, "sysconf"):
        return math.nan
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def free_memory(system: Path = Path("/")) -> float:
    """Return how many bytes this process can take without swapping; infinity if the system does not report it."""
    lines = _read(system / "proc/meminfo").splitlines()
    free = [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min([*free, *map(_left_in, threads.cgroups(system))], default=math.inf)


def _left_in(cgroup: Path) -> float:
    """Return how many bytes a cgroup's limit leaves, counting cached files as free; infinity if it has no limit."""
    for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        limit, taken = _read(cgroup / most), _read(cgroup / used)
        if limit.isdecimal() and taken.isdecimal():
            stat = dict(line.split() for line in _read(cgroup / "memory.stat").splitlines())
            return max(0.0, float(limit) - int(taken) + int(stat.get("inactive_file", 0)))
    return math.inf


def last_level_cache() -> int:
    """Return its size in bytes, as the kernel reports it, or else 32 MiB."""
    sizes = _cache_sizes()
    return sizes[max(sizes)] if sizes else 32 * 2**20


def _cache_sizes() -> dict[int, int]:
    """Bytes of one data or unified cache, by level."""
    sizes = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        size = _read(index / "size")
        if _read(index / "type") in ("Data", "Unified") and size.endswith("K"):
            sizes[int(_read(index / "level"))] = int(size[:-1]) * 1024
    return sizes


def _caches() -> str:
    sizes = sorted(_cache_sizes().items())
    return ", ".join(f"L{level} {size // 1024:,} KiB" for level, size in sizes) or "caches unknown"


def cpu_model() -> str:
    """Return the processor's name."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Return how many cores this process may run on."""
    return threads.usable_cpus()


def _governor() -> str:
    return _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")) or "unknown"


def _huge_pages() -> str:
    modes = _read(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    return modes.partition("[")[2].partition("]")[0] or "unknown"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
