"""Guards the arithmetic of the tables that the CUDA engine's kernels read: every element and chunk once, in order.

They are compared with plain loops over rows of any size and layout.
"""

import ctypes
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchers import Device
from lucid.engine.cuda.device_tables import DeviceTables
from lucid.engine.cuda.row_table import (
    DeviceRow,
    Geometry,
    Gradients,
    Kind,
    Programs,
    RowTable,
    cut,
)
from lucid.engine.numbers import BLOCK, CHUNK, COLUMNS, MomentFormat
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
        values[:, 8] = [row.elements for row in self.rows]
        values[:, 9] = self.lengths
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


@given(told_rows(largest=200_000), st.sampled_from([1, 3, 8]))
@settings(deadline=None, max_examples=examples(150))
def test_every_chunk_is_measured_once(told, together):
    rows = RowTable(told)
    for device in rows.devices:
        launches, chunks = rows.squares(device, together)
        begins = np.cumsum(chunks) - chunks
        found = {}
        for kind, programs, to in launches:
            for n, part, place in zip(programs.rows.tolist(), programs.parts.tolist(), to.tolist(), strict=True):
                assert Gradients.of(told.rows[n]) == kind
                for k in range(together):  # as the kernel does, where there is such a chunk
                    if (part * together + k) * CHUNK < told.rows[n].elements:
                        assert found.setdefault(place + k, (n, part * together + k)) == (n, part * together + k)
        wanted = [
            (n, chunk)
            for n, row in enumerate(told.rows)
            if row.device_index == device[1]
            for chunk in range(-(-row.elements // CHUNK))
        ]
        assert [found[place] for place in range(len(found))] == wanted
        assert begins[0] == 0
        assert chunks.sum() == len(wanted)
        assert len({kind for kind, *_ in launches}) == len(launches)


@given(st.lists(st.integers(0, 3 * CHUNK), max_size=6), st.integers(0, 5))
@settings(deadline=None, max_examples=examples(100))
def test_sums_are_cut_into_chunks(counts, gap):
    begins = np.array([sum(counts[:k]) + gap * k for k in range(len(counts))], np.int64)
    segments, parts, starts = cut(np.array(counts, np.int64), begins)
    wanted = [
        (begins[k] + first, min(CHUNK, count - first))
        for k, count in enumerate(counts)
        for first in range(0, count, CHUNK)
    ]
    assert list(zip(segments.begin.tolist(), segments.length.tolist(), strict=True)) == wanted
    assert segments.to.tolist() == list(range(len(wanted)))
    assert parts.tolist() == [-(-count // CHUNK) for count in counts]
    assert starts.tolist() == [0, *itertools.accumulate(parts.tolist())][:-1][: len(counts)]


@given(st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 50)), max_size=20))
@settings(deadline=None)
def test_programs_are_the_parts_of_rows_in_order(pairs):
    programs = Programs.of(*(np.array([pair[k] for pair in pairs], np.int64) for k in range(2)))
    wanted = [(row, part) for row, parts in pairs for part in range(parts)]
    assert list(zip(programs.rows.tolist(), programs.parts.tolist(), strict=True)) == wanted
    assert programs.packed.tolist() == [row + (part << 32) for row, part in wanted]


class Counting(Device):
    """Runs what measures as if each chunk's sum were 1, so that rows of billions of elements can be measured."""

    def launch(self, prepared, programs, args, kind):
        name = prepared.fn.__name__
        self.launched.append((name, programs))
        if name == "squares":
            rows, step, tables, _, sums, count, _ = args
            together = kind[-1]
            table = tables.numpy()[: 2 * programs].reshape(2, programs)
            row, part = table[0] & 0xFFFFFFFF, table[0] >> 32
            elements = rows.numpy().reshape(-1)[: count * COLUMNS].reshape(count, COLUMNS)[row, 8]
            given = step.numpy()[row] != 0
            for k in range(together):
                own = given & ((part * together + k) * CHUNK < elements)
                sums.numpy()[table[1][own] + k] += 1
        else:
            values, sums, tables, *_ = args
            begin, length, to = tables.numpy()[: 3 * programs].reshape(3, programs).tolist()
            for first, count, place in zip(begin, length, to, strict=True):
                assert 0 < count <= CHUNK
                sums.numpy()[place] = values.numpy()[first : first + count].sum()


@pytest.mark.parametrize(
    "sizes", [[5], [0, 1], [CHUNK + 1, 0, 7, CHUNK], [3 * CHUNK**2 + 5, 9, 0, 2**33 + 1, CHUNK**2], [1] * 5000], ids=str
)
def test_rows_of_any_size_are_summed_up(sizes):
    """By levels of chunks of sums: a row of 2^33 elements has 2^21 chunks, whose sums are 2^9 chunks."""
    rows = [
        DeviceRow(n, 1, n % 3 == 2, k := n % 2, k, 0, 0, False, 0, False, True, True, size)
        for n, size in enumerate(sizes)
    ]
    table = RowTable(Told(rows, [1] * len(rows)))
    counting = Counting()
    on_device = DeviceTables(counting, (1, 0), table)
    step = np.ones((3, len(rows)), np.int64)
    on_device.refresh(step, 1)
    measuring = on_device.measuring()
    for each in measuring.launches:
        counting.launch(each.prepared, each.programs, each.args, each.kind)
    found = measuring.row_sums.tolist()[: len(rows)]
    own = [row.device_index == 0 for row in rows]
    assert found == [-(-size // CHUNK) if mine else 0 for size, mine in zip(sizes, own, strict=True)]
    assert on_device.active(step) == [n for n, mine in enumerate(own) if mine]
