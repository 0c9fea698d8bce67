"""Which engine updates a parameter, and which one updates state that is on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import cpu, cuda

# How state on the host is updated if its parameter is on a GPU. True: by the GPU, in pinned memory, where it lies.
# False: by the host's CPU, piece by piece (offload.py); this goes once a GPU has been seen to run the other way faster.
IN_PLACE = True

forced: str | None = None  # the engine that tests have chosen for everything


def name_for(device: torch.device) -> str:
    """Return the name of the engine that updates parameters on `device`: "cpu", "cuda" or "reference"."""
    if forced is not None:
        return forced
    if device.type == "cpu" and cpu.missing is None:
        return "cpu"
    if device.type == "cuda" and cuda.missing is None:
        return "cuda"
    return "reference"


def in_place(device: torch.device) -> bool:
    """Whether state on the host of parameters on `device` is pinned memory that the GPU updates where it lies."""
    return IN_PLACE and name_for(device) == "cuda"


@contextmanager
def only(name: str) -> Iterator[None]:
    """Run every step inside on one engine, for tests: "reference", or "cuda", interpreted for tensors on the CPU."""
    global forced
    before, forced = forced, name
    try:
        yield
    finally:
        forced = before
