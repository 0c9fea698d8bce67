"""What kernels are told of the rows of a plan, as tables: where everything is, and which program does what."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lucid.engine import _cpu

Table = NDArray[np.int64]

COLUMNS = 16  # of a row, as in csrc/plan.h
OPERANDS = 6  # of a parameter's shape
CHUNK = 4096  # elements whose squares are summed up together, and sums that are
BLOCK = 128
PLAIN, BFLOAT16, EIGHT_BIT = range(3)  # how moments are kept, as in csrc/kernels.h
FLOAT64 = 1


class DeviceRow(NamedTuple):
    """A row that is bound to a device, as ``csrc/plan.h`` has it; types and formats by number."""

    row: int
    device_type: int
    device_index: int
    compute: int
    gradient: int
    form: int
    moments: int
    amsgrad: bool
    dims: int
    numbered: bool
    whole_rows: bool
    wide: bool
    elements: int


class Kind(NamedTuple):
    """What a kernel is compiled for: how the rows that it updates are stored."""

    gradient: int
    compute: int
    form: int
    moments: int
    amsgrad: bool
    dims: int
    numbered: bool
    whole_rows: bool
    wide: bool

    @classmethod
    def of(cls, row: DeviceRow) -> Kind:
        """Return the kind of a row: what does not matter to it is the same in all."""
        draws, blocks = row.moments != PLAIN, row.moments == EIGHT_BIT
        return cls(
            row.gradient,
            row.compute,
            row.form,
            row.moments,
            row.amsgrad,
            row.dims,
            draws and row.numbered,
            not blocks or row.whole_rows,
            row.wide,
        )


class Geometry(NamedTuple):
    """How elements are shared out: how many a program updates at once, how often it does so, by how many warps."""

    tile: int
    tiles: int
    warps: int


class Gradients(NamedTuple):
    """What the kernel of squares is compiled for."""

    gradient: int
    compute: int
    dims: int
    wide: bool

    @classmethod
    def of(cls, row: DeviceRow) -> Gradients:
        """Return the kind of a row's gradient."""
        return cls(row.gradient, row.compute, row.dims, row.wide)


class Programs(NamedTuple):
    """The programs of a launch: for each the number of its row, and which part of it."""

    rows: Table
    parts: Table

    @classmethod
    def of(cls, rows: Table, parts: Table) -> Programs:
        """Return one program for each of so many parts of each row."""
        ends = np.cumsum(parts)
        first = np.repeat(ends - parts, parts)
        return cls(np.repeat(rows, parts), np.arange(ends[-1] if len(ends) else 0, dtype=np.int64) - first)

    @property
    def packed(self) -> Table:
        """As kernels read them."""
        return self.rows | self.parts << 32


class Launch(NamedTuple):
    """An update of rows of one kind."""

    kind: Kind
    geometry: Geometry
    programs: Programs


class Segments(NamedTuple):
    """Sums to be summed up: where each run of up to CHUNK begins, how many they are, where the result belongs."""

    begin: Table
    length: Table
    to: Table


def cut(counts: Table, begins: Table) -> tuple[Segments, Table, Table]:
    """Return how to sum up runs of sums by chunks, and how many sums that makes of each run, and where they begin."""
    parts = -(-counts // CHUNK)
    ends = np.cumsum(parts)
    programs = Programs.of(np.arange(len(counts), dtype=np.int64), parts)
    offset = programs.parts * CHUNK
    segments = Segments(
        begins[programs.rows] + offset,
        np.minimum(CHUNK, counts[programs.rows] - offset),
        np.arange(len(programs.rows), dtype=np.int64),
    )
    return segments, parts, ends - parts


class Rows:
    """The rows of a plan that are bound to devices, whichever, and how they are laid out for launches."""

    def __init__(self, native: _cpu.Plan) -> None:
        self.structure: int = native.device_structure
        self.serial: bool = native.serial
        self.rows = [DeviceRow(*row) for row in native.device_rows()]
        dims = sum(row.dims for row in self.rows)
        self.table: Table = np.zeros((len(self.rows), COLUMNS), np.int64)
        self.layouts: Table = np.zeros(max(1, dims * (1 + OPERANDS)), np.int64)
        native.write_device_rows(self.table.ctypes.data, self.layouts.ctypes.data)
        # (type, index) of each device that rows are on.
        self.devices = list(dict.fromkeys((row.device_type, row.device_index) for row in self.rows))
        self._elements: Table = np.array([row.elements for row in self.rows], np.int64)

    def _of_device(self, type_and_index: tuple[int, int]) -> list[int]:
        return [n for n, row in enumerate(self.rows) if (row.device_type, row.device_index) == type_and_index]

    def launches(self, device: tuple[int, int], geometry_of: Callable[[Kind], Geometry]) -> list[Launch]:
        """Return the launches that update the rows of a device, in order: one for each kind.

        Where rows share memory, one for each row.
        """
        by_kind: dict[tuple[int, Kind], list[int]] = {}
        for number in self._of_device(device):
            by_kind.setdefault((number if self.serial else 0, Kind.of(self.rows[number])), []).append(number)
        found = []
        for (_, kind), numbers in by_kind.items():
            rows = np.array(numbers, np.int64)
            geometry = geometry_of(kind)
            part = geometry.tile * geometry.tiles
            if kind.whole_rows:
                parts = -(-self._elements[rows] // part)
            else:
                length = self.table[rows, 9]
                blocks = self._elements[rows] // np.maximum(length, 1) * -(-length // BLOCK)
                parts = -(-blocks // (part // BLOCK))
            programs = Programs.of(rows, parts)
            if len(programs.rows):
                found.append(Launch(kind, geometry, programs))
        return found

    def squares(self, device: tuple[int, int], together: int) -> tuple[list[tuple[Gradients, Programs, Table]], Table]:
        """Return the launches that sum up the squares of gradients: their kind, programs, and where sums belong.

        Also how many sums that makes of each row.
        """
        own = np.array(self._of_device(device), np.int64)
        chunks = np.zeros(len(self.rows), np.int64)
        chunks[own] = -(-self._elements[own] // CHUNK)
        begins = np.cumsum(chunks) - chunks
        by_kind: dict[Gradients, list[int]] = {}
        for number in own.tolist():
            by_kind.setdefault(Gradients.of(self.rows[number]), []).append(number)
        found = []
        for kind, numbers in by_kind.items():
            rows = np.array(numbers, np.int64)
            programs = Programs.of(rows, -(-chunks[rows] // together))
            if len(programs.rows):
                found.append((kind, programs, begins[programs.rows] + programs.parts * together))
        return found, chunks
