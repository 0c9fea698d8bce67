"""A plan's rows on GPUs, in a step: what is not as it was is uploaded, kernels are launched, nothing waits.

What becomes of a step may be decided there (`lucid.engine.Decision`): then the host's step counts are a guess, that all
steps are taken, until `DevicePlan.settle`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lucid.engine.interrupts import uninterrupted
from lucid.engine.observed import Seen
from lucid.engine.scalars import Decision, Recipe, Scalars

from .launch import Launcher, launcher_for
from .resident import COUNT, SET, Launch, Resident
from .table import Rows, Table

if TYPE_CHECKING:
    from lucid.engine import _cpu

# Words that stay on the device from step to step, and how many: how far the host's step counts are behind, steps left
# out; of the last step, as float64, the norm of all gradients and what they were multiplied with.
_DRIFT, _SKIPPED, _NORM, _SCALE, _KEPT = range(5)


class Unread:
    """What a row's step was like: on the device until someone looks."""

    __slots__ = ("_place", "_resident")

    def __init__(self, resident: Resident, place: int) -> None:
        self._resident, self._place = resident, place

    def __iter__(self) -> Iterator[float]:
        return iter(self._resident.observed()[self._place])


class _Captured(NamedTuple):
    """A captured step: its tables, what the host tells it each time it is run, and a step count of each set in that."""

    resident: Resident
    config: Tensor
    counts: list[Tensor]
    every_count: list[Tensor]  # of all rows

    def keep_up(self) -> None:
        """Let it count on from where the host's step counts are."""
        words = self.config.view(torch.float64)
        for number, count in enumerate(self.counts, 1):
            words[number * SET + COUNT] = count.item() + 1


class DevicePlan:
    """The rows of a plan that are on GPUs."""

    def __init__(self, native: _cpu.Plan) -> None:
        self._native = native
        self._rows: Rows | None = None
        self._step: Table = np.zeros((3, 1), np.int64)
        self._version = 0
        self._residents: dict[tuple[int, int, int], Resident] = {}  # by device and stream
        self._kept: dict[tuple[int, int], Tensor] = {}  # of each device
        self._decider = (0, 0)  # the device whose guesses the host's step counts are
        self._captured: list[_Captured] = []
        self._capturing: _Captured | None = None  # in this step
        self._forgotten: list[_Captured] = []  # which may be run all the same, and find their tables where they were
        self._launches: list[tuple[Launcher, list[Launch]]] = []
        self._seen: list[tuple[int, Seen]] = []
        self.guessing = False  # whether the host's step counts are a guess

    @property
    def captured(self) -> bool:
        """Whether steps have been captured, which may have been run since."""
        return bool(self._captured)

    def _current(self, only: tuple[int, int] | None = None, *, captured: bool = False) -> Iterator[Resident]:
        """What lies on each device, or on one, as this step needs it, with that device the current one."""
        native = self._native
        rows = self._rows
        if rows is None or rows.structure != native.device_structure or rows.serial != native.serial:
            rows = self._rows = Rows(native)
            self._residents.clear()
            self._step = np.zeros((3, max(1, len(rows.rows))), np.int64)
            self._version += 1
        self._version += native.write_device_step(self._step.ctypes.data)
        for device in rows.devices if only is None else [only]:
            launcher = launcher_for(device)
            with launcher.current():
                place = (*device, launcher.stream())
                resident = self._residents.get(place)
                if captured:
                    resident = Resident(launcher, device, rows, captured=True)
                elif resident is None:
                    resident = self._residents[place] = Resident(launcher, device, rows)
                if device not in self._kept:  # not while a step is captured: it would be zeroed each time that is run
                    self._kept[device] = launcher.empty(_KEPT).zero_()
                resident.refresh(self._step, self._version)
                yield resident

    def squares(self) -> list[tuple[int, float]]:
        """Return (row number, sum of the squares of its gradient) for the rows of this step; waits for the device."""
        found = []
        for resident in self._current():
            measuring = resident.measuring()
            _launch(resident.launcher, measuring.launches)
            rows, sums = resident.rows.rows, measuring.row_sums.tolist()
            found += [(rows[place].row, sums[place]) for place in resident.active(self._step)]
        return found

    def prepare(self, recipes: Sequence[Recipe], scalars: Sequence[Scalars] | Decision, *, observe: bool) -> None:
        """Upload and compile what `run` launches: what can go wrong does so here.

        ``scalars``: made of the recipes, or what the device has to know to make them.
        """
        self._launches, self._seen = [], []
        residents = (
            self._current(self._native.only_device(), captured=scalars.captured)
            if isinstance(scalars, Decision)
            else self._current()
        )
        for resident in residents:
            launches: list[Launch] = []
            if isinstance(scalars, Decision):
                launches = self._deciding(resident, recipes, scalars)
            else:
                resident.set_scalars(scalars, [recipe.step for recipe in recipes])
            self._launches.append((resident.launcher, launches + resident.updates(observe=observe)))
            if observe:
                rows = resident.rows.rows
                self._seen += [(rows[place].row, Unread(resident, place)) for place in resident.active(self._step)]

    def _deciding(self, resident: Resident, recipes: Sequence[Recipe], decision: Decision) -> list[Launch]:
        """The launches before those that update."""
        measuring = list(resident.measuring().launches) if decision.measures else []
        deciding, config = resident.decide(decision, recipes, self._kept[resident.device])
        if decision.captured:
            count_of = {(group, count.item() + 1): count for group, count in self._native.step_counts()}
            counts = [count_of[recipe.group, recipe.step] for recipe in recipes]
            every_count = [count for _, count in self._native.step_counts()]
            self._capturing = _Captured(resident, config, counts, every_count)
        return measuring + deciding

    def run(self, *, counted: bool) -> list[tuple[int, Seen]]:
        """Launch what was prepared, all of it; return what rows' steps are like, if that is observed.

        ``counted``: whether the host has counted the step, which it does not while one is captured.
        """
        launches, self._launches = self._launches, []
        for launcher, each in launches:
            with launcher.current():
                _launch(launcher, each)
        if counted:
            self.keep_up()
        elif self._capturing is not None:
            self._captured.append(self._capturing)
        self._capturing = None
        return self._seen

    def keep_up(self) -> None:
        """Let captured steps count on from where the host's step counts are."""
        for each in self._captured:
            each.keep_up()

    # Step counts

    def guess(self) -> bool:
        """Take the step counts of this step's rows for a guess; False where those of other rows are one already."""
        device = self._native.only_device()
        if (self.guessing and device != self._decider) or not self._native.guess():
            return False
        self.guessing, self._decider = True, device
        return True

    @property
    def begun(self) -> bool:
        """Whether a step has been taken on the device of this one's rows, as one that is captured needs."""
        return self._native.only_device() in self._kept

    def settle(self) -> int:
        """Make the host's step counts right, waiting for the device; return how many steps it has left out."""
        if not self.guessing:
            return 0
        counts = (
            self._kept[self._decider][: _SKIPPED + 1] if self._decider in self._kept else torch.zeros(2, device="cpu")
        )
        drift, skipped = counts.tolist()
        with uninterrupted():
            counts.zero_()
            self._native.settle(int(drift), keep=self.captured)
            self.guessing = self.captured
        self.keep_up()
        return int(skipped)

    def captured_counts(self) -> list[Tensor]:
        """Return the step counts that captured steps go on with when they are run."""
        return [count for each in self._captured for count in each.every_count]

    def forget_captured(self) -> None:
        """Count the steps of captured ones no longer."""
        self.settle()
        self._forgotten += self._captured
        self._captured.clear()
        self._native.settle(0, keep=False)
        self.guessing = False

    def decided(self) -> tuple[Tensor, Tensor]:
        """Return, on the device, the norm of all gradients and their scale in the last step that was decided there."""
        words = self._kept[self._decider].view(torch.float64)
        return words[_NORM], words[_SCALE]


def _launch(launcher: Launcher, launches: Sequence[Launch]) -> None:
    for each in launches:
        launcher.launch(each.prepared, each.programs, each.args, each.kind)
