"""Launches kernels: compiled by Triton on a GPU, or interpreted on the CPU, where tests compare all bits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lucid.engine.numbers import Dtype, MomentFormat
from lucid.engine.pinned import Event

from .decide import decide
from .kernels import update
from .row_table import Geometry, Gradients, Kind
from .squares import settle, squares

__all__ = ["GPU", "Interpreter", "decide", "settle", "squares", "update"]

# A fused multiply-add would round once where the contract rounds twice.
_OPTIONS = {"enable_fp_fusion": False}


class GPU:
    """Launches kernels on the current stream of a GPU, and compiles each when it is first needed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def geometry(self, kind: Kind) -> Geometry:
        """Return how elements are divided among programs, as measured on an H100 (benchmarks/RESULTS-gpu.md).

        Few elements per thread need few registers, so enough threads run to hide the latency of memory. Stochastic
        rounding and encoding need much preparation, so several tiles share it. A thread with more elements of a block
        shares the block's scales.
        """
        if not kind.draws:
            return Geometry(512, 1, 4)
        if kind.moments == MomentFormat.EIGHT_BIT:
            return Geometry(256 if kind.dims == 0 else 128, 8, 1)  # strides need registers
        return Geometry(256, 8, 2)

    def measuring(self, kind: Gradients) -> Geometry:
        """Return how elements are divided among programs that sum squares."""
        if kind.dims:
            return Geometry(128, 8, 4)  # strides need registers
        return Geometry(512 if kind.compute == Dtype.FLOAT64 else 1024, 8, 4)

    def current(self) -> AbstractContextManager[Any]:
        """Return a context manager that makes this device the current one."""
        if torch.cuda.current_device() == self.device.index:
            return nullcontext()
        return torch.cuda.device(self.device)

    def stream(self) -> int:
        """Return a number that identifies the current stream."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def empty(self, words: int) -> Tensor:
        """Return uninitialized memory for `words` numbers of 64 bits."""
        with torch.inference_mode(False):  # a tensor made in that mode cannot be written outside of it
            return torch.empty(words, dtype=torch.int64, device=self.device)

    def staging(self, words: int) -> Tensor:
        """Return pinned host memory for `words` numbers, which the device can read directly."""
        with torch.inference_mode(False):
            return torch.empty(words, dtype=torch.int64, device="cpu", pin_memory=True)

    def upload(self, target: Tensor, staged: Tensor) -> None:
        """Copy in the order of the stream; do not wait."""
        target.copy_(staged, non_blocking=True)

    def event(self) -> Event:
        """Return a new event, for the work of the current stream."""
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def everything(self) -> Event:
        """Return an event that comes after all work of this device, replays of CUDA graphs included."""
        return _Everything(self.device)

    def prepare(self, kernel: Any, args: Sequence[Any], kind: Sequence[Any], warps: int) -> Any:
        """Return the kernel as `launch` takes it. Everything that can fail (compiling, loading) happens here."""
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


class _Everything:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


class _Done:
    """An event of a device that has finished each launch when it returns."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Interpreter:
    """Runs kernels in Triton's interpreter, on CPU tensors."""

    device = torch.device("cpu")

    def geometry(self, kind: Kind) -> Geometry:
        return Geometry(2048, 2, 1)  # large tiles, because the interpreter's time per tile hardly depends on its size

    def measuring(self, kind: Gradients) -> Geometry:
        return Geometry(16384, 1, 1)

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

    def event(self) -> Event:
        return _Done()

    def everything(self) -> Event:
        return _Done()

    def prepare(self, kernel: Any, args: Sequence[Any], kind: Sequence[Any], warps: int) -> Any:
        return kernel

    def launch(self, prepared: Any, programs: int, args: Sequence[Any], kind: Sequence[Any]) -> None:
        with np.errstate(all="ignore"):
            prepared[(programs,)](*args, *kind)


Launcher = GPU | Interpreter

_launchers: dict[tuple[int, int], Launcher] = {}


def launcher_for(device: tuple[int, int]) -> Launcher:
    """Return the launcher of a device, the same at each call; `device` is DLPack's (type, index)."""
    found = _launchers.get(device)
    if found is None:
        kind, index = device
        found = _launchers[device] = Interpreter() if kind == 1 else GPU(torch.device("cuda", index))
    return found
