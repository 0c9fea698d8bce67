"""The CUDA engine in a step: it uploads what has changed and launches kernels, and the host does not wait.

The device may decide the step (`lucid.engine.verdict.DeviceVerdict`). Then the host's step counts are assumed
(`lucid.engine.step_counts`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from lucid.engine import pinned
from lucid.engine.cpu import bind
from lucid.engine.exact_sum import TOTAL_WORDS
from lucid.engine.interrupts import uninterrupted
from lucid.engine.numbers import KEPT
from lucid.engine.observed import Seen
from lucid.engine.protocol import StepOrder
from lucid.engine.row import Row
from lucid.engine.scalars import Recipe
from lucid.engine.shards import local
from lucid.engine.step_counts import CapturedStep, Device, DeviceCounts, StepCounts
from lucid.engine.verdict import DeviceVerdict

from .device_tables import DeviceTables, Launch
from .launch import Launcher, launcher_for
from .row_table import RowTable, Table

if TYPE_CHECKING:
    from lucid.engine import _cpu


class Unread:
    """The observation of a row, which stays on the device until somebody iterates over it."""

    __slots__ = ("_place", "_tables")

    def __init__(self, tables: DeviceTables, place: int) -> None:
        self._tables, self._place = tables, place

    def __iter__(self) -> Iterator[float]:
        return iter(self._tables.observed()[self._place])


class _Exchanging(NamedTuple):
    """What a step does before it is decided by several processes."""

    tables: DeviceTables
    measuring: list[Launch]
    exchange: Callable[[Tensor], Tensor]


class CUDA:
    """The CUDA engine of one plan, a `lucid.engine.protocol.Engine`."""

    def __init__(self, rows: _cpu.Rows, counts: StepCounts) -> None:
        self._rows = rows
        self.counts: DeviceCounts = counts.begin(rows)
        self._row_table: RowTable | None = None
        self._step: Table = np.zeros((3, 1), np.int64)
        self._version = 0
        self._tables: dict[tuple[int, int, int], DeviceTables] = {}  # by device and stream
        self._capturing: CapturedStep | None = None  # if this step is captured
        self._exchanging: _Exchanging | None = None
        self._launches: list[tuple[Launcher, list[Launch]]] = []
        self._observed: list[tuple[int, Seen]] = []
        self._writes_host = False  # whether the state of any row is in pinned memory

    def bind(self, row: Row) -> None:
        bind(self._rows, row, on_device=True)
        parts = (local(slot) for slot in row.slots.values())
        self._writes_host |= any(pinned.arena.holds(part) for part in parts if part.numel())

    def _current(self, only: Device | None = None, *, captured: bool = False) -> Iterator[DeviceTables]:
        """Yield the tables of each device, or of `only`, up to date for this step; that device is the current one."""
        rows, row_table = self._rows, self._row_table
        if row_table is None or row_table.structure != rows.device_structure or row_table.serial != rows.serial:
            row_table = self._row_table = RowTable(rows)
            self._tables.clear()
            self._step = np.zeros((3, max(1, len(row_table.rows))), np.int64)
            self._version += 1
        self._version += rows.write_device_step(self._step.ctypes.data)
        for device in row_table.devices if only is None else [only]:
            launcher = launcher_for(device)
            with launcher.current():
                place = (*device, launcher.stream())
                tables = self._tables.get(place)
                if captured:
                    tables = DeviceTables(launcher, device, row_table, captured=True)
                elif tables is None:
                    tables = self._tables[place] = DeviceTables(launcher, device, row_table)
                if device not in self.counts.words:  # never while capturing: each replay would zero it
                    self.counts.words[device] = launcher.empty(KEPT).zero_()
                    self.counts.alarms[device] = launcher.staging(1).zero_().numpy()
                tables.refresh(self._step, self._version)
                yield tables

    def measure(self, scale: float, kinds: array[int] | None) -> list[int]:
        """Return the words as `Engine.measure` does; wait for the devices."""
        total = np.zeros(TOTAL_WORDS * (1 if kinds is None else 1 + max(kinds)), np.int64)
        for tables in self._current():
            launches = tables.measure(scale, kinds)
            with uninterrupted():  # what is begun must be settled
                _launch(tables.launcher, launches)
            total += tables.words.tolist()
        found: list[int] = total.tolist()
        return found

    def prepare(self, order: StepOrder) -> None:
        self._launches, self._observed, self._exchanging = [], [], None
        verdict = order.verdict
        some_cautious = any(recipe.cautious_decay for recipe in order.recipes)
        only, captured = None, False
        if isinstance(verdict, DeviceVerdict):
            only, captured = self._rows.only_device(), verdict.captured
        for tables in self._current(only, captured=captured):
            launches: list[Launch] = []
            if isinstance(verdict, DeviceVerdict):
                launches = self._deciding(tables, order.recipes, verdict)
            else:
                assert order.table is not None
                tables.set_scalars(order.table)
            launches += tables.updates(some_cautious=some_cautious, observe=order.observe)
            self._launches.append((tables.launcher, launches))
            if order.observe:
                rows = tables.row_table.rows
                self._observed += [(rows[place].row, Unread(tables, place)) for place in tables.active(self._step)]

    def _deciding(self, tables: DeviceTables, recipes: Sequence[Recipe], verdict: DeviceVerdict) -> list[Launch]:
        """Return the launches that `write` does before the update; those before an exchange are left to `exchange`."""
        device = tables.device
        alarm = self.counts.alarms[device].ctypes.data
        kept, spikes = self.counts.words[device], self.counts.spikes
        measuring, decide, config = tables.decide(verdict, recipes, kept, alarm, spikes)
        if verdict.captured:
            own = self._rows.step_counts()
            count_of = {(group, count.item() + 1): count for group, count in own}
            counts = [count_of[recipe.group, recipe.step] for recipe in recipes]
            alive = [tables, kept, self.counts.alarms[device]]
            self._capturing = CapturedStep(config, counts, [count for _, count in own], alive)
        if verdict.exchange is None:
            return [*measuring, decide]
        self._exchanging = _Exchanging(tables, measuring, verdict.exchange)
        return [decide]

    def exchange(self) -> None:
        """Launch the measuring kernels and exchange what they find, if processes decide this prepared step together."""
        if self._exchanging is None:
            return
        tables, measuring, exchange = self._exchanging
        with tables.launcher.current():
            with uninterrupted():
                _launch(tables.launcher, measuring)
            tables.words[:TOTAL_WORDS].copy_(exchange(tables.words))

    def write(self) -> list[tuple[int, Seen]]:
        """Launch all prepared kernels. The caller holds back interrupts."""
        launches, self._launches = self._launches, []
        captured, self._capturing = self._capturing, None
        for launcher, each in launches:
            with launcher.current():
                _launch(launcher, each)
                if self._writes_host:
                    launched(launcher, captured=captured is not None)
        if captured is not None:
            self.counts.captured.append(captured)
        return self._observed

    def release(self) -> None:
        self._launches, self._observed, self._capturing, self._exchanging = [], [], None, None


def launched(launcher: Launcher, *, captured: bool) -> None:
    """Remember that launched kernels write to pinned state: those of the current stream, or of all replays."""
    if captured:
        pinned.in_flight.launched((launcher.device, None), launcher.everything)
    else:
        pinned.in_flight.launched((launcher.device, launcher.stream()), launcher.event)


def _launch(launcher: Launcher, launches: Sequence[Launch]) -> None:
    for each in launches:
        launcher.launch(each.prepared, each.programs, each.args, each.kind)
