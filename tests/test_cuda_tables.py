"""Guards the arithmetic of the tables that the CUDA engine's kernels read: every element and chunk once, in order.

They are compared with plain loops over rows of any size and layout.
"""

import ctypes
from array import array

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lucid.engine.cuda.row_table import (
    DeviceRow,
    Geometry,
    Gradients,
    Kind,
    Programs,
    RowTable,
)
from lucid.engine.numbers import BLOCK, COLUMNS, Column, MomentFormat
from quick import examples


class Told:
    """A native plan that tells of made-up rows."""

    device_structure = 1

    def __init__(self, rows, lengths, serial=False):
        self.rows, self.lengths, self.serial = rows, lengths, serial

    def device_rows(self):
        return self.rows

    def write_device_rows(self, table, layouts):
        values = np.zeros((len(self.rows), COLUMNS), np.int64)
        values[:, Column.ELEMENTS] = [row.elements for row in self.rows]
        values[:, Column.ROW] = self.lengths
        ctypes.memmove(table, values.tobytes(), values.nbytes)


@st.composite
def told_rows(draw, largest=60_000):
    """Rows of few kinds on one of two devices, encoded ones of rows of their own."""
    rows, lengths = [], []
    for number in range(draw(st.integers(1, 12))):
        moments = draw(st.integers(0, 2))
        length = draw(st.sampled_from([64, 100, 128, 129, 256, 1000])) if moments == MomentFormat.EIGHT_BIT else 7
        elements = (
            length * draw(st.integers(0, largest // length))
            if moments == MomentFormat.EIGHT_BIT
            else draw(st.integers(0, largest))
        )
        rows.append(
            DeviceRow(
                row=number * 3,
                device_type=1,
                device_index=draw(st.integers(0, 1)),
                compute=draw(st.integers(0, 1)),
                gradient=draw(st.integers(0, 1)),
                form=0,
                moments=moments,
                amsgrad=False,
                ema=draw(st.booleans()),
                dims=0,
                numbered=draw(st.booleans()),
                whole_rows=length % BLOCK == 0,
                wide=True,
                elements=elements,
            )
        )
        lengths.append(length)
    return Told(rows, lengths, draw(st.booleans()))


def geometry_of(kind):
    return Geometry(256 if kind.moments == MomentFormat.EIGHT_BIT else 512, 1 + kind.moments, 4)


@given(told_rows())
@settings(deadline=None, max_examples=examples(150))
def test_every_element_is_updated_by_one_program(told):
    rows = RowTable(told)
    assert sorted(rows.devices) == sorted({(row.device_type, row.device_index) for row in told.rows})
    for device in rows.devices:
        own = [n for n, row in enumerate(told.rows) if row.device_index == device[1]]
        launches = rows.updates(device, geometry_of)
        seen = []
        for each in launches:
            assert each.geometry == geometry_of(each.kind)
            in_launch = list(dict.fromkeys(each.programs.rows.tolist()))
            assert in_launch == sorted(in_launch)
            assert not told.serial or len(in_launch) == 1
            assert all(Kind.of(told.rows[n]) == each.kind for n in in_launch)
            assert each.programs.packed.tolist() == [
                n + (part << 32)
                for n, part in zip(each.programs.rows.tolist(), each.programs.parts.tolist(), strict=True)
            ]
            for n in in_launch:
                seen.append(n)
                parts = each.programs.parts[each.programs.rows == n].tolist()
                assert parts == list(range(len(parts)))
                elements, length = told.rows[n].elements, told.lengths[n]
                size = each.geometry.tile * each.geometry.tiles
                if not each.kind.whole_rows:  # by blocks, of which the last of a row is not full
                    elements, size = elements // length * -(-length // BLOCK), size // BLOCK
                assert (len(parts) - 1) * size < elements <= len(parts) * size
        assert sorted(seen) == [n for n in own if told.rows[n].elements]
        if told.serial:
            assert seen == sorted(seen)
        else:
            assert len({each.kind for each in launches}) == len(launches)


@given(told_rows(largest=200_000), st.sampled_from([Geometry(64, 1, 4), Geometry(512, 3, 4)]), st.data())
@settings(deadline=None, max_examples=examples(150))
def test_every_element_is_measured_once(told, geometry, data):
    """By one kernel for each kind of gradient and of rows."""
    rows = RowTable(told)
    kinds = data.draw(st.one_of(st.none(), st.lists(st.integers(0, 2), min_size=40, max_size=40)))
    kinds = None if kinds is None else array("i", kinds)
    for device in rows.devices:
        launches = rows.squares(device, kinds, lambda kind: geometry)
        found = []
        for kind, of_rows, used, programs in launches:
            assert used == geometry
            for n, part in zip(programs.rows.tolist(), programs.parts.tolist(), strict=True):
                assert Gradients.of(told.rows[n]) == kind
                assert of_rows == (0 if kinds is None else kinds[told.rows[n].row])
                found.append((n, part))
        size = geometry.tile * geometry.tiles
        wanted = [
            (n, part)
            for n, row in enumerate(told.rows)
            if row.device_index == device[1]
            for part in range(-(-row.elements // size))
        ]
        assert sorted(found) == wanted
        assert len({(kind, of_rows) for kind, of_rows, *_ in launches}) == len(launches)


@given(st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 50)), max_size=20))
@settings(deadline=None)
def test_programs_are_the_parts_of_rows_in_order(pairs):
    programs = Programs.of(*(np.array([pair[k] for pair in pairs], np.int64) for k in range(2)))
    wanted = [(row, part) for row, parts in pairs for part in range(parts)]
    assert list(zip(programs.rows.tolist(), programs.parts.tolist(), strict=True)) == wanted
    assert programs.packed.tolist() == [row + (part << 32) for row, part in wanted]
