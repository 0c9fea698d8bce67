"""The plan: which rows a step updates, on which engines, as one unit.

A step is `gather`, `bind` for every row that needs a look and `compare` after them, `measure` if anyone wants to know
the gradients' norm, `steps`, `run`, `release`. Nothing that the user sees is written before `run`, and `run` leaves
nothing half done.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import cpu, reference
from .observed import Observed
from .row import Row
from .scalars import Scalars

_only_reference = False


def name_for(device: torch.device) -> str:
    """Return the name of the engine that updates parameters on `device`."""
    if device.type == "cpu" and cpu.missing is None and not _only_reference:
        return "cpu"
    return "reference"


@contextmanager
def only_reference() -> Iterator[None]:
    """Run every step inside on the reference engine, to compare another with it."""
    global _only_reference
    before, _only_reference = _only_reference, True
    try:
        yield
    finally:
        _only_reference = before


class Plan:
    """The rows of one optimizer.

    The CPU engine keeps its rows from step to step and names those that are not as they were; rows of other
    engines are looked at anew each time.
    """

    def __init__(self, groups: list[list[Tensor]]) -> None:
        self._native = cpu.Plan(groups) if name_for(torch.device("cpu")) == "cpu" else None
        self._only_reference = _only_reference
        self._ids = [id(param) for group in groups for param in group]
        self._rows: list[Row] = []
        self._updates: list[reference.Update] = []
        self._squares: list[tuple[int, float]] = []
        self._writing = False

    def gather(self, groups: list[list[Tensor]], state_box: list[Any]) -> list[int] | None:
        """Begin a step: the numbers of the rows to bind, or None where this plan is of other parameters.

        ``state_box`` is [state, whether anyone was given it since the last step] and the state's only holder. As
        long as nobody was given it and nobody holds a part of it, it is as it was and need not be read again.
        """
        self.release()
        if self._only_reference != _only_reference:
            return None
        if self._native is not None:
            return self._native.gather(groups, state_box)
        params = [param for group in groups for param in group]
        if [id(param) for param in params] != self._ids:
            return None
        return [index for index, param in enumerate(params) if param.grad is not None]

    def bind(self, row: Row) -> None:
        """Let a checked row take part in this step."""
        engine = name_for(row.param.device)
        if engine == "cpu" and self._native is not None:
            fault = self._native.bind(row.index, row.gradient, row.entry, {"step": row.step} | row.slots, row.numbering)
            if fault is not None:
                raise ValueError(f"{row.name} cannot be updated: {fault}")
            return
        if not _only_reference:
            _warn_of_reference(row.param.device)
        self._rows.append(row)

    def compare(self) -> None:
        """Raise where the state of a row that is bound lies in the memory of another."""
        if self._native is not None:
            self._native.compare()

    def steps(self) -> list[tuple[int, float]]:
        """Return (group, step count) for each of the scalars that `run` wants, in its order."""
        native = [] if self._native is None else self._native.steps()
        return native + [(row.group, row.step.item() + 1) for row in self._rows]

    def measure(self) -> None:
        """Sum up the squares of each gradient of this step."""
        if self._native is not None:
            self._native.measure(torch.get_num_threads())
        self._squares = [(row.index, reference.squares(row)) for row in self._rows]

    def square_sum(self) -> float:
        """Return the sum of what was measured, which does not depend on threads or SIMD levels."""
        if self._native is not None and not self._rows:
            return self._native.square_sum()
        return reference.ordered_sum([square for _, square in self.squares()])

    def squares(self) -> list[tuple[int, float]]:
        """Return (row number, sum of the squares of its gradient) for the rows of this step, in order."""
        native = [] if self._native is None else self._native.squares()
        return sorted(native + self._squares)

    def run(self, scalars: Sequence[Scalars], state_box: list[Any], *, observe: bool) -> list[tuple[int, Observed]]:
        """Update every row, or none if an exception comes before the first write.

        Returns what each row's step was like, by row number, if it is to `observe`.
        """
        own = len(scalars) - len(self._rows)
        observed: list[tuple[int, Observed]] = []
        if self._rows:
            self._updates, observed = reference.compute(self._rows, scalars[own:], observe=observe)
        if self._native is not None:
            self._native.remember(state_box[0])
            torch.autograd.graph.increment_version(self._native.params())
        try:
            self._write(scalars[:own], state_box, observe)
        except BaseException:  # an interrupt between two writes: finish them first
            if self.ran:
                self._write(scalars[:own], state_box, observe)
            raise
        if observe and self._native is not None:
            observed += self._native.observed()
        return observed

    def _write(self, scalars: Sequence[Scalars], state_box: list[Any], observe: bool) -> None:
        self._writing = True
        if self._native is not None and not self._native.ran:
            self._native.run(list(scalars), torch.get_num_threads(), observe, state_box)
        if self._updates:
            reference.commit(self._updates)

    @property
    def ran(self) -> bool:
        """Whether this step has begun to write."""
        return self._writing if self._native is None else self._native.ran

    def release(self) -> None:
        """End the step; let go of its gradients."""
        self._rows, self._updates, self._writing = [], [], False
        if self._native is not None:
            self._native.release()


_warned_of: set[str] = set()


def _warn_of_reference(device: torch.device) -> None:
    """Say once for each kind of device that its parameters are updated slowly, and why."""
    if device.type in _warned_of:
        return
    _warned_of.add(device.type)
    reason = cpu.missing if device.type == "cpu" else f"there is none for {device.type} devices yet"
    warnings.warn(
        f"lucid.optim updates parameters on {device.type} with its slow reference engine: {reason}",
        RuntimeWarning,
        stacklevel=6,
    )
