"""How kernels are launched: compiled by Triton on a GPU, or interpreted on the CPU, where tests compare every bit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .kernels import decide, squares, sum_up, update
from .table import EIGHT_BIT, PLAIN, Geometry, Kind

__all__ = ["GPU", "Interpreter", "decide", "squares", "sum_up", "update"]

# No multiplication and addition may become one rounding.
_OPTIONS = {"enable_fp_fusion": False}


class GPU:
    """A GPU: kernels are compiled when they are first wanted, and launched on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def geometry(self, kind: Kind) -> Geometry:
        """Return how elements are shared out.

        As measured on an H100 (benchmarks/RESULTS-gpu.md): few elements a thread leave room in its registers, so that
        enough threads are there to hide the memory's latency; where much comes before drawing and encoding, several
        tiles share it, and a thread with more elements of a block shares its scales.
        """
        if kind.moments == PLAIN:
            return Geometry(512, 1, 4)
        if kind.moments == EIGHT_BIT:
            return Geometry(256 if kind.dims == 0 else 128, 8, 1)  # strides take registers
        return Geometry(256, 8, 2)

    def current(self) -> AbstractContextManager[Any]:
        """Make this device the current one, within."""
        if torch.cuda.current_device() == self.device.index:
            return nullcontext()
        return torch.cuda.device(self.device)

    def stream(self) -> int:
        """Return what tells the current stream from others."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def empty(self, words: int) -> Tensor:
        """Return memory for so many numbers of 64 bits."""
        with torch.inference_mode(False):  # what is made in that mode could not be written to outside
            return torch.empty(words, dtype=torch.int64, device=self.device)

    def staging(self, words: int) -> Tensor:
        """Return memory of the host that the device can read by itself."""
        with torch.inference_mode(False):
            return torch.empty(words, dtype=torch.int64, device="cpu", pin_memory=True)

    def upload(self, target: Tensor, staged: Tensor) -> None:
        """Copy, in the order of the stream, and wait for nothing."""
        target.copy_(staged, non_blocking=True)

    def prepare(self, kernel: Any, args: Sequence[Any], kind: Sequence[Any], warps: int) -> Any:
        """Return what `launch` takes; whatever can go wrong does so here."""
        key = (kernel, tuple(kind), warps)
        compiled = self._compiled.get(key)
        if compiled is None:
            with self.current():
                compiled = kernel.warmup(*args, *kind, grid=(1,), num_warps=warps, **_OPTIONS)
                compiled._init_handles()
            self._compiled[key] = compiled
        return compiled

    def launch(self, prepared: Any, programs: int, args: Sequence[Any], kind: Sequence[Any]) -> None:
        """Launch a kernel."""
        prepared[(programs, 1, 1)](*args, *kind)


class Interpreter:
    """Triton's interpreter, on tensors of the CPU."""

    device = torch.device("cpu")

    def geometry(self, kind: Kind) -> Geometry:
        return Geometry(2048, 2, 1)  # each tile takes as long, whatever its size

    def current(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def stream(self) -> int:
        return 0

    def empty(self, words: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty(words, dtype=torch.int64, device="cpu")

    def staging(self, words: int) -> Tensor:
        return self.empty(words)

    def upload(self, target: Tensor, staged: Tensor) -> None:
        target.copy_(staged)

    def prepare(self, kernel: Any, args: Sequence[Any], kind: Sequence[Any], warps: int) -> Any:
        return kernel

    def launch(self, prepared: Any, programs: int, args: Sequence[Any], kind: Sequence[Any]) -> None:
        with np.errstate(all="ignore"):
            prepared[(programs,)](*args, *kind)


Launcher = GPU | Interpreter

_launchers: dict[tuple[int, int], Launcher] = {}


def launcher_for(device: tuple[int, int]) -> Launcher:
    """Return the launcher of a device, given as DLPack does, (type, index): the same each time."""
    found = _launchers.get(device)
    if found is None:
        kind, index = device
        found = _launchers[device] = Interpreter() if kind == 1 else GPU(torch.device("cuda", index))
    return found
