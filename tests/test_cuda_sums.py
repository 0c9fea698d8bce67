"""Guards sums of squares of any size on the CUDA engine: in the documented order, to the bit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

import lucid.optim as optim
from bits import draw, on
from gradients import LIES, uneven
from lucid import engine
from lucid.engine.cuda import launch, row_table
from quick import examples


def measured(optimizer):
    """Each gradient's sum of squares and all of them together, as the engine in use gives them; then the norm."""
    found = []
    native = engine.Plan.measure

    def measure(plan):
        native(plan)
        found.append((plan.squares(), plan.square_sum()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Plan, "measure", measure)
        optimizer.nonfinite = "error"  # so that the host decides
        optimizer.step()
    [(squares, total)] = found
    optimizer.nonfinite = "propagate"
    optimizer.step()
    assert optimizer.grad_norm.item() == math.sqrt(total)
    return squares, total


SUMS = [1, 31, 32, 33, 4095, 4096, 4097, 8 * 4096 - 1, 8 * 4096, 8 * 4096 + 1, 9 * 4096 + 5]


def of_sizes(sizes, dtype, gradient_dtype, lies):
    """After two steps of all rows some have no gradient: they stay in the tables."""
    params = [Parameter(torch.zeros(size, dtype=dtype)) for size in sizes]
    optimizer = optim.AdamW(params)
    for number, param in enumerate(params):
        param.grad_dtype = None
        param.grad = LIES[lies](uneven(number, param.shape, gradient_dtype))
    optimizer.step()
    optimizer.step()
    for param in params[2::4]:
        param.grad = None
    optimizer.max_grad_norm = math.inf
    return optimizer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "gradient_dtype", "lies"),
    [
        (torch.float32, torch.float32, "dense"),
        (torch.float32, torch.float64, "strided"),
        (torch.bfloat16, torch.bfloat16, "strided"),
        (torch.bfloat16, torch.float16, "dense"),
        (torch.float64, torch.bfloat16, "dense"),
        (torch.float64, torch.float64, "expanded"),
        (torch.complex64, torch.complex128, "dense"),
    ],
    ids=str,
)
def test_squares_of_any_size(dtype, gradient_dtype, lies):
    """Rows without a gradient, in between, take no place in the sum."""
    found = []
    for name in ("reference", "cpu", "cuda"):
        with on(name):
            found.append(measured(of_sizes(SUMS[:: 1 if dtype == gradient_dtype else 2], dtype, gradient_dtype, lies)))
    assert found[0] == found[1] == found[2]


def test_empty_gradients_take_a_place_in_the_sum():
    for number in range(20):
        norms = []
        for name in ("reference", "cuda"):
            params = [Parameter(torch.zeros(size)) for size in (1, 0, 1, 1, 1, 0, 1, 1, 1)]
            for param, values in zip(params, draw(number, (9, 1)), strict=True):
                param.grad = values[: param.numel()].clone()
            optimizer = optim.AdamW(params, max_grad_norm=math.inf)
            with on(name):
                norms.append(measured(optimizer))
        assert norms[0] == norms[1]


def summed_up(values, counts, order=None):
    """Runs of sums, one after the other, by the levels of the kernel; float64[3, runs]."""
    counts = np.array(counts, np.int64)
    begins = np.cumsum(counts) - counts
    interpreter = launch.Interpreter()
    while True:
        segments, parts, starts = row_table.cut(counts, begins)
        sums = torch.zeros(3, int(parts.sum()), dtype=torch.float64)
        words = torch.from_numpy(np.concatenate([segments.begin, segments.length, segments.to]))
        args = (values, sums, words, words if order is None else order, values.shape[1], sums.shape[1])
        interpreter.launch(launch.sum_up, len(segments.begin), args, (order is not None,))
        if parts.max() <= 1:
            return sums, np.flatnonzero(parts).tolist()
        values, counts, begins, order = sums, parts, starts, None


def test_sums_of_sums():
    counts = [1, 31, 32, 33, 0, 640, 4095, 4096, 4097, 0, 3 * 4096 + 40]
    runs = [uneven(k, (count,), torch.float64).square() for k, count in enumerate(counts)]
    others = [draw(k, (2, count), torch.float64).abs() for k, count in enumerate(counts)]
    sums, which = summed_up(torch.cat([torch.cat(runs)[None], torch.cat(others, 1)]), counts)
    assert which == [k for k, count in enumerate(counts) if count]
    for number, k in enumerate(which):
        assert sums[:, number].tolist() == [engine.ordered_sum(runs[k]), *others[k].amax(1).tolist()], counts[k]
    assert any(engine.ordered_sum(run) != engine.ordered_sum(run.flip(0)) for run in runs)  # the order shows


@pytest.mark.parametrize("rows", [5, 700, 4096, 4096 + 900])
def test_the_sum_over_rows_leaves_out_those_without_a_gradient(rows):
    """As many as a chunk and more."""
    own = torch.rand(rows, generator=torch.Generator().manual_seed(rows)) < 0.8
    values = torch.stack([uneven(0, (rows,), torch.float64), *draw(0, (2, rows), torch.float64).abs()])
    values[:, ~own] = math.nan  # what was there before
    sums, _ = summed_up(values, [int(own.sum())], own.nonzero().flatten())
    assert sums.flatten().tolist() == [engine.ordered_sum(values[0, own]), *values[1:, own].amax(1).tolist()]


@settings(max_examples=examples(60), deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.one_of(st.sampled_from([0, 1, 4095, 4096, 4097, 4096 * 4096, 4096 * 4096 + 1]), st.integers(0, 2**26)),
        min_size=1,
        max_size=6,
    )
)
def test_runs_are_cut_into_chunks_that_cover_them(counts):
    counts = np.array(counts, np.int64)
    begins = np.cumsum(counts) - counts + 5
    segments, parts, starts = row_table.cut(counts, begins)
    assert parts.tolist() == [-(-count // 4096) for count in counts.tolist()]
    assert segments.to.tolist() == list(range(int(parts.sum())))
    for begin, count, start, number in zip(begins, counts, starts, parts, strict=True):
        own = slice(start, start + number)
        assert np.array_equal(segments.begin[own], begin + 4096 * np.arange(number))
        assert segments.length[own].sum() == count
        assert (segments.length[own][:-1] == 4096).all()
        assert (segments.length[own] > 0).all()
