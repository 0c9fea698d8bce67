"""Guards the exact sum of squares on the CUDA engine: to the bit, against whole numbers and the reference engine.

Gradients are of every type and of the whole range of their types, in any layout, cut into parts of any size.
"""

import contextlib
import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

import lucid.optim as optim
from bits import on, same
from gradients import LIES
from lucid import engine
from lucid.engine import exact_sum
from lucid.engine.cuda import launch
from lucid.engine.cuda.row_table import Geometry
from lucid.engine.cuda.squares import root_of
from lucid.engine.exact_sum import TOTAL_WORDS, WORDS, Count
from lucid.engine.numbers import COPIES, PADDED, SET
from quick import examples

NAN, INF = math.nan, math.inf


def measured(optimizer, scale=1.0, kinds=None):
    """The words that the engine in use gives for a step."""
    found = []
    native = engine.Plan.measure

    def measure(plan, *_):
        found.append(native(plan, scale, kinds))
        return native(plan, 1.0, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Plan, "measure", measure)
        optimizer.nonfinite, optimizer.max_grad_norm = "error", 1e18  # so that the host decides
        with contextlib.suppress(FloatingPointError):
            optimizer.step()
    return found[0]


def sum_of(words):
    return words[:WORDS], [words[count] for count in (Count.NAN, Count.INFINITE, Count.LARGE)]


def spread(seed, size, low, high, dtype):
    """Numbers of random exponents."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(low, high, (size,), generator=generator)
    values = torch.ldexp(torch.randn(size, generator=generator, dtype=torch.float64), exponents)
    return values.to(dtype)


def optimizer_of(gradients, dtype):
    params = [Parameter(torch.zeros(gradient.shape, dtype=dtype)) for gradient in gradients]
    for param, gradient in zip(params, gradients, strict=True):
        param.grad_dtype = None
        param.grad = gradient
    return optim.AdamW(params)


def exact(gradients, dtype):
    """The sum of fl64(g·g), in multiples of 2⁻¹⁰⁷⁴."""
    total = 0
    for gradient in gradients:
        wide = gradient.to(torch.float64 if dtype == torch.float64 else torch.float32).double().numpy()
        with np.errstate(all="ignore"):
            for square in (wide * wide).reshape(-1).tolist():
                number, power = square.as_integer_ratio()
                total += number << (1075 - power.bit_length())
    return total


RANGES = {
    "like gradients": (torch.float32, torch.float32, -12, -4),
    "the whole of float32": (torch.float32, torch.float32, -149, 125),
    "subnormal float32": (torch.float32, torch.float32, -155, -127),
    "the whole of bfloat16": (torch.bfloat16, torch.bfloat16, -133, 125),
    "the whole of float16": (torch.float16, torch.float16, -24, 13),
    "float16 to float32": (torch.float32, torch.float16, -24, 13),
    "rounded to float32": (torch.float32, torch.float64, -170, 125),
    "float64": (torch.float64, torch.float64, -12, -4),
    "the whole of float64": (torch.float64, torch.float64, -545, 508),
    "subnormal squares": (torch.float64, torch.float64, -540, -511),
    "beyond float64": (torch.float64, torch.float64, 508, 509),
    "bfloat16 to float64": (torch.float64, torch.bfloat16, -133, 125),
}
PARTS = {
    Geometry(16384, 1, 1): (1, 0, 255, 16384, 16385),
    Geometry(64, 4, 1): (7, 256, 257),
    Geometry(8, 3, 1): (5, 50),
}


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("kind", RANGES.values(), ids=RANGES.keys())
def test_the_sum_is_exact(kind, parts, monkeypatch):
    dtype, gradient_dtype, low, high = kind
    monkeypatch.setattr(launch.Interpreter, "measuring", lambda self, kind: parts)
    gradients = [spread(seed, size, low, high, gradient_dtype) for seed, size in enumerate(PARTS[parts])]
    total = exact(gradients, dtype)
    optimizer = optimizer_of(gradients, dtype)
    with on("cuda"):
        words = measured(optimizer)
        assert exact_sum.whole(words) == total
        assert words[:WORDS] == exact_sum.words_of(total)
        optimizer.nonfinite, optimizer.max_grad_norm = "propagate", INF
        optimizer.step()  # the device decides
        assert optimizer.grad_norm.item() == exact_sum.root(total)


FAULTS = [NAN, INF, -INF, 2.0**64, -(2.0**64), math.nextafter(2.0**64, 0), 2.0**70, 2.0**600, 2.0**512, 2.0**511.5]


@pytest.mark.parametrize("scale", [1.0, 2.0**-70, 2.0**16, 1000.0, 3e-39, 2.0**100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_faults_are_counted_as_the_reference_counts_them(dtype, scale):
    gradients = []
    for number, fault in enumerate(FAULTS):
        gradient = spread(number, 300, -12, 60, torch.float64)
        gradient[[5, 299]] = fault * min(scale, 1e200)
        gradients.append(gradient.to(dtype))
    found = []
    for name in ("reference", "cpu", "cuda"):
        with on(name):
            found.append([sum_of(measured(optimizer_of([gradient], dtype), scale)) for gradient in gradients])
    assert found[0] == found[1] == found[2]
    assert all(any(counts[k] for _, counts in found[0]) for k in range(2 if scale > 2.0**64 else 3))


@pytest.mark.parametrize("lies", LIES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_layouts_do_not_show(dtype, lies):
    shape = (4, 3, 10, 9) if lies == "channels-last" else (40, 27)
    real = spread(3, 2160, -20, 5, torch.float64)
    values = (torch.view_as_complex(real.view(-1, 2)) if dtype.is_complex else real[:1080]).to(dtype).view(shape)
    gradient = LIES[lies](values)
    words = []
    for name in ("reference", "cuda"):
        with on(name):
            words.append(sum_of(measured(optimizer_of([gradient], dtype))))
    with on("cuda"):
        words.append(sum_of(measured(optimizer_of([gradient.resolve_conj().resolve_neg().contiguous()], dtype))))
    assert words[0] == words[1] == words[2]


def test_kinds_of_rows_have_words_of_their_own():
    """And rows without a gradient have none."""
    from array import array

    gradients = [spread(seed, 50, -9, 3, (torch.float32, torch.float64)[seed % 2]) for seed in range(6)]
    found = []
    for name in ("reference", "cpu", "cuda"):
        params = [Parameter(torch.zeros_like(gradient)) for gradient in gradients]
        optimizer = optim.AdamW(params)
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        with on(name):
            optimizer.step()
            params[4].grad = None
            words = measured(optimizer, kinds=array("i", [0, 2, 0, 1, 1, 2]))
        found.append([sum_of(words[start : start + TOTAL_WORDS]) for start in range(0, len(words), TOTAL_WORDS)])
    assert found[0] == found[1] == found[2]
    wanted = [exact([gradients[k] for k in of], torch.float64) for of in ([0, 2], [3], [1, 5])]
    assert [exact_sum.whole(words) for words, _ in found[0]] == wanted


def test_the_order_of_rows_does_not_show():
    gradients = [spread(seed, 100 + seed, -30, 30, torch.float32) for seed in range(12)]
    with on("cuda"):
        assert measured(optimizer_of(gradients, torch.float32)) == measured(
            optimizer_of(gradients[::-1], torch.float32)
        )


# The kernels that work on words


@triton.jit
def root_at(words, out):
    tl.store(out, root_of(words))


def root(words):
    found = torch.empty(1, dtype=torch.float64)
    launch.Interpreter().launch(root_at, 1, (torch.tensor(words, dtype=torch.int64), found), ())
    return found.item()


bits = st.integers(0, 2 ** (32 * WORDS) - 1)
sums = st.one_of(
    st.builds(lambda value, shift: value << shift, st.integers(0, 2**56), st.integers(0, 32 * WORDS - 58)),
    st.builds(lambda value, shift, low: (value << shift) + low, st.integers(2**52, 2**54), st.integers(0, 2000), bits),
    st.builds(lambda value, shift: value >> shift, bits, st.integers(0, 32 * WORDS)),
).filter(lambda total: total < 2 ** (32 * WORDS))


@given(sums, st.lists(st.tuples(st.integers(0, WORDS - 2), st.integers(0, 2**20)), max_size=5))
@settings(max_examples=examples(300), deadline=None)
def test_the_root_is_the_one_of_exact_sum(total, kept):
    """Whether or not carries have been moved up."""
    words = exact_sum.words_of(total)
    for place, count in kept:
        count = min(count, words[place + 1])
        words[place] += count << 32
        words[place + 1] -= count
    assert root(words) == exact_sum.root(total)


@pytest.mark.parametrize("total", [0, 1, 2, 2**53, 2**53 + 1, 2**54 + 2, 2**54 + 6, 2**2143, 2**2144 - 1, 2**96 - 1])
def test_roots_at_edges(total):
    assert root(exact_sum.words_of(total)) == exact_sum.root(total)


@given(st.integers(1, 3), st.integers(0, 2**62), st.integers(0, WORDS - 1), st.integers(1, WORDS))
@settings(max_examples=examples(60), deadline=None)
def test_copies_are_added_and_carries_moved_up(kinds, seed, first, count):
    generator = np.random.default_rng(seed)
    copies = np.zeros((kinds, COPIES, PADDED), np.int64)
    last = min(first + count, WORDS)
    copies[:, :, first:last] = generator.integers(
        0, 2**58 if last < WORDS - 1 else 2**20, (kinds, COPIES, last - first)
    )
    copies[:, :, WORDS : WORDS + 3] = generator.integers(0, 9, (kinds, COPIES, 3))
    added = copies.sum(1)
    held = torch.from_numpy(copies)
    words = torch.full((kinds * TOTAL_WORDS,), -5)
    launch.Interpreter().launch(launch.settle, kinds, (torch.zeros(SET, dtype=torch.int64), held, words), ())
    assert not held.any()
    for own, wanted in zip(words.view(kinds, -1).tolist(), added.tolist(), strict=True):
        assert own[:WORDS] == exact_sum.words_of(exact_sum.whole(wanted))
        assert own[WORDS : WORDS + 3] == wanted[WORDS : WORDS + 3]
        assert own[Count.BAD] == own[Count.FAILED] == 0
    assert not words.view(kinds, -1)[:, Count.BEGUN].any()


def test_what_is_measured_twice_is_the_same():
    """Nothing of the first sum is left."""
    gradients = [spread(1, 3000, -9, 3, torch.float32)]
    optimizer = optimizer_of(gradients, torch.float32)
    with on("cuda"):
        found = [measured(optimizer) for _ in range(3)]
        optimizer.nonfinite, optimizer.max_grad_norm = "skip", INF
        norms = []
        for _ in range(3):
            optimizer.step()
            norms.append(optimizer.grad_norm.clone())
    assert found[0] == found[1] == found[2]
    assert same(torch.stack(norms), torch.stack([norms[0]] * 3))
