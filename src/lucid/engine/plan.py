"""The plan: which rows a step updates, on which engines, as one unit.

A step is `gather`, `bind` for every row that needs a look and `compare` after them, `settle` unless the device decides
what becomes of it, `steps`, `measure` if the host wants to know the gradients' norm, `run`, `release`. Nothing that the
user sees is written before `run`, and `run` leaves nothing half done.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import cpu, cuda, offload, reference
from .interrupts import uninterrupted
from .observed import Seen
from .row import Row
from .scalars import Decision, Recipe

if TYPE_CHECKING:
    from .cuda.device import DevicePlan

_only: str | None = None  # the engine that runs everything, for tests


def name_for(device: torch.device) -> str:
    """Return the name of the engine that updates parameters on `device`: "cpu", "cuda" or "reference"."""
    if _only is not None:
        return _only
    if device.type == "cpu" and cpu.missing is None:
        return "cpu"
    if device.type == "cuda" and cuda.missing is None:
        return "cuda"
    return "reference"


@contextmanager
def only(name: str) -> Iterator[None]:
    """Run every step inside on one engine, to compare another with it: "reference", or "cuda" where it interprets."""
    global _only
    before, _only = _only, name
    try:
        yield
    finally:
        _only = before


class Plan:
    """The rows of one optimizer.

    Those of the CPU and CUDA engines are kept from step to step, and those are named that are not as they were; rows of
    the reference engine are looked at anew each time.
    """

    def __init__(self, groups: list[list[Tensor]]) -> None:
        self._native = None if cpu.missing is not None or _only == "reference" else cpu.Plan(groups)
        self._device: DevicePlan | None = None
        self.on_device = False  # whether any row was bound to a GPU
        self._offload: offload.Offload | None = None
        self._groups = groups
        self._only = _only
        self._ids = [id(param) for group in groups for param in group]
        self._rows: list[Row] = []
        self._updates: list[reference.Update] = []
        self._squares: list[tuple[int, float]] = []
        self._observed: list[tuple[int, Seen]] = []
        self._writing = False
        self._launched = self._sent = False

    def gather(self, groups: list[list[Tensor]], state_box: list[Any]) -> list[int] | None:
        """Begin a step: the numbers of the rows to bind, or None where this plan is of other parameters.

        ``state_box`` is [state, whether anyone was given it since the last step] and the state's only holder. As
        long as nobody was given it and nobody holds a part of it, it is as it was and need not be read again.
        """
        self.release()
        if self._only != _only:
            return None
        if self._native is not None:
            return self._native.gather(groups, state_box)
        params = [param for group in groups for param in group]
        if [id(param) for param in params] != self._ids:
            return None
        return [index for index, param in enumerate(params) if param.grad is not None]

    def bind(self, row: Row) -> None:
        """Let a checked row take part in this step."""
        device = row.gradient.device
        engine = name_for(device)
        if self._native is not None and _only != "reference" and offload.is_offloaded(row):
            if self._offload is None:
                self._offload = offload.Offload(self._groups)
            self._offload.bind(row)
            return
        if engine != "reference" and self._native is not None:
            slots = {"step": row.step} | row.slots
            on_device = engine == "cuda"
            fault = self._native.bind(row.index, row.gradient, row.entry, slots, row.numbering, on_device)
            if fault is not None:
                raise ValueError(f"{row.name} cannot be updated: {fault}")
            if on_device and self._device is None:
                from .cuda.device import DevicePlan

                self._device = DevicePlan(self._native)
                self.on_device = True
            return
        if _only is None:
            _warn_of_reference(device)
        self._rows.append(row)

    def compare(self) -> None:
        """Raise where the state of a row that is bound lies in the memory of another."""
        if self._native is not None:
            self._native.compare()
        if self._offload is not None:
            self._offload.compare()

    # What is left to a device

    @property
    def deciding(self) -> torch.device | None:
        """The GPU on which all rows of this step are, which can decide what becomes of it; None where they are not."""
        if self._native is None or self._device is None or self._rows or self._offloaded:
            return None
        kind, index = self._native.only_device()
        if not kind:
            return None
        return torch.device("cpu") if kind == 1 else torch.device("cuda", index)

    def guess(self) -> bool:
        """Take this step's counts for a guess that the device corrects; False where those of other rows are one."""
        return self._device is not None and self._device.guess()

    def settle(self) -> int:
        """Wait for the device where step counts are a guess, and correct them; return how many steps it left out."""
        return 0 if self._device is None else self._device.settle()

    @property
    def begun(self) -> bool:
        """Whether the device of this step's rows has taken a step, as one that is captured needs."""
        return self._device is not None and self._device.begun

    @property
    def guessing(self) -> bool:
        """Whether step counts are a guess."""
        return self._device is not None and self._device.guessing

    @property
    def captured(self) -> bool:
        """Whether steps have been captured, which may have been run since."""
        return self._device is not None and self._device.captured

    def left_alone(self, other: Plan) -> bool:
        """Whether this step leaves rows alone that go on in captured steps of `other`, which may be this plan."""
        if self._native is None or other._device is None:
            return False
        counts = {id(count) for _, count in self._native.step_counts()}
        return any(id(count) not in counts for count in other._device.captured_counts())

    def keep_up(self) -> None:
        """Let captured steps count on from where the host's step counts are."""
        if self._device is not None:
            self._device.keep_up()

    def forget_captured(self) -> None:
        """Count the steps of captured ones no longer: what they work on is replaced."""
        if self._device is not None:
            self._device.forget_captured()

    def decided(self) -> tuple[Tensor, Tensor]:
        """Return the norm of all gradients, where it was measured, and their scale, as the device has decided."""
        assert self._device is not None
        return self._device.decided()

    # The step

    def steps(self) -> list[tuple[int, float]]:
        """Return (group, step count) for each of the recipes that `run` wants, in its order."""
        native = [] if self._native is None else self._native.steps()
        offloaded = [] if self._offload is None else self._offload.steps()
        return native + [(row.group, row.step.item() + 1) for row in self._rows] + offloaded

    @property
    def _offloaded(self) -> list[Row]:
        """The rows of this step whose state is on the host, and their parameters elsewhere."""
        return [] if self._offload is None else self._offload.rows

    def measure(self) -> None:
        """Sum up the squares of each gradient of this step."""
        if self._native is not None:
            self._native.measure(torch.get_num_threads())
        self._squares = [(row.index, reference.squares(row)) for row in self._rows]
        if self._device is not None:
            self._squares += self._device.squares()
        if self._offload is not None and self._offload.rows:
            self._squares += self._offload.squares()

    def square_sum(self) -> float:
        """Return the sum of what was measured, which does not depend on threads, SIMD levels or engines."""
        if self._native is not None and not self._squares:
            return self._native.square_sum()
        return reference.ordered_sum([square for _, square in self.squares()])

    def squares(self) -> list[tuple[int, float]]:
        """Return (row number, sum of the squares of its gradient) for the rows of this step, in order."""
        native = [] if self._native is None else self._native.squares()
        return sorted(native + self._squares)

    def run(
        self, recipes: Sequence[Recipe], verdict: float | Decision, state_box: list[Any], *, observe: bool
    ) -> list[tuple[int, Seen]]:
        """Update every row, or none if an exception comes before the first write.

        ``verdict``: what gradients are multiplied with, or what is left to the device. Returns what each row's step was
        like, by row number, if it is to `observe`.
        """
        scalars = [] if not isinstance(verdict, float) else [recipe.scalars(verdict) for recipe in recipes]
        offloaded = self._offloaded
        own = len(recipes) - len(self._rows) - len(offloaded)
        last = own + len(self._rows)
        count = isinstance(verdict, float) or not verdict.captured
        observed: list[tuple[int, Seen]] = []
        if self._rows:
            self._updates, seen = reference.compute(self._rows, scalars[own:last], observe=observe)
            observed += seen
        if self._device is not None:
            made = scalars[:own] if isinstance(verdict, float) else verdict
            self._device.prepare(recipes[:own], made, observe=observe)
        if self._offload is not None:
            self._offload.prepare(scalars[last:])
        if self._native is not None:
            self._native.remember(state_box[0])
            torch.autograd.graph.increment_version(self._native.params() + [row.param for row in offloaded])
        try:
            self._write(scalars[:own], state_box, observe, count)
        except BaseException:  # an interrupt between two writes: finish them first
            if self.ran:
                self._write(scalars[:own], state_box, observe, count)
            raise
        if observe and self._native is not None:
            observed += self._native.observed()
        return observed + self._observed

    def _write(self, scalars: Sequence[Any], state_box: list[Any], observe: bool, count: bool) -> None:
        self._writing = True
        elsewhere = self._device is not None or self._offload is not None
        with uninterrupted() if elsewhere else nullcontext():
            if self._native is not None and not self._native.ran:
                self._native.run(list(scalars), torch.get_num_threads(), observe, count, state_box)
            if self._device is not None and not self._launched:
                self._launched = True
                self._observed += self._device.run(counted=count)
            if self._offload is not None and not self._sent:
                self._sent = True
                self._observed += self._offload.run(torch.get_num_threads(), observe=observe)
        if self._updates:
            reference.commit(self._updates)

    @property
    def ran(self) -> bool:
        """Whether this step has begun to write."""
        return self._writing if self._native is None else self._native.ran

    def release(self) -> None:
        """End the step; let go of its gradients."""
        self._rows, self._updates, self._squares, self._observed = [], [], [], []
        self._writing = self._launched = self._sent = False
        if self._offload is not None:
            self._offload.release()
        if self._native is not None:
            self._native.release()


_warned_of: set[str] = set()


def _warn_of_reference(device: torch.device) -> None:
    """Say once for each kind of device that its parameters are updated slowly, and why."""
    if device.type in _warned_of:
        return
    _warned_of.add(device.type)
    known = {"cpu": cpu.missing, "cuda": cuda.missing}
    reason = known.get(device.type) or f"there is none for {device.type} devices yet"
    warnings.warn(
        f"lucid.optim updates parameters on {device.type} with its slow reference engine: {reason}",
        RuntimeWarning,
        stacklevel=6,
    )
