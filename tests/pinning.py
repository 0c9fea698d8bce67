"""Pinned memory where no GPU is: ordinary pages of the host, from which a device's kernels are interpreted.

Under `only("cuda")`, parameters on the CPU stand for those on a GPU, so `state_device="cpu"` puts their state there.
"""

import numpy as np

from lucid.engine import pinned


class Pages:
    """Gives out pieces, full of what must not be relied on; `limit` bytes in all. ``asked``: the sizes asked for."""

    def __init__(self, limit=1 << 40):
        self.limit, self.asked = limit, []

    def __call__(self, size):
        self.asked.append(size)
        if sum(self.asked) > self.limit:
            raise RuntimeError("CUDA error: out of memory")
        return np.full(size, 0x7F, np.uint8)


def pretend_pinned(monkeypatch, pages=None):
    """Put a new arena in the place of the process's; return it."""
    arena = pinned.Arena(pages or Pages())
    monkeypatch.setattr(pinned, "arena", arena)
    monkeypatch.setattr(pinned, "in_flight", pinned.InFlight())
    return arena


def lies_in(arena, entry):
    """Whether all of a parameter's state that kernels use is in the arena."""
    from lucid.engine.shards import local

    return all(arena.holds(local(value)) for key, value in entry.items() if key not in ("step", "stream"))
