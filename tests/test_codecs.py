"""Guards moments in eight bits: what the code may lose, and that every engine stores the same bits in every format.

The codec in torch operations is held against its definition written once more in closed form, exhaustively where the
domain is small; the CPU engine, at every SIMD level, against the codec. Engine steps are chosen so that what is stored
is known: see stored.py and `read_moments`. Parameters and moments of 16 bits are in test_codecs_16_bits.py, the draws
for stochastic rounding in test_draws.py.
"""

import contextlib
import itertools
import math
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

import lucid.optim as optim
from bits import on
from lucid import engine
from lucid.engine import codecs
from quick import examples
from stored import (
    DRAWS,
    ENGINES,
    LEAST_SCALE,
    LEVELS,
    RATE,
    SIGNED_LARGEST,
    STILL,
    UNSIGNED_LARGEST,
    assert_encodes,
    assert_stored,
    bits_of,
    float32,
    generator,
    int16,
    random_bits,
    stepped,
)

# Codes of eight bits


def signed_table():
    positive = [2.0 ** (code // 16 + 1) * (1 + code % 16 / 16) - 2 for code in range(128)]
    return torch.tensor(positive + [-value for value in positive])


def unsigned_table():
    return torch.tensor([2.0 ** (code // 16 + 1) * (1 + code % 16 / 16) - 1.9375 for code in range(256)])


Kind = types.SimpleNamespace
SIGNED = Kind(
    name="exp_avg",
    encode=codecs.encode_signed,
    decode=codecs.decode_signed,
    table=signed_table(),
    largest=SIGNED_LARGEST,
    offset=2.0,
)
UNSIGNED = Kind(
    name="exp_avg_sq",
    encode=codecs.encode_unsigned,
    decode=codecs.decode_unsigned,
    table=unsigned_table(),
    largest=UNSIGNED_LARGEST,
    offset=1.9375,
)
both = pytest.mark.parametrize("kind", [SIGNED, UNSIGNED], ids=lambda kind: kind.name)


def every_code(kind, rows):
    """Codes (rows, 384) that hold every code in each row, and in each of its three blocks the top one."""
    top = 127 if kind is SIGNED else 255
    first, second, third = torch.arange(256).split(127)
    lead = torch.tensor([top])
    row = torch.cat([lead, first, lead, second, lead, third, lead.expand(125)])
    return row.to(torch.uint8).expand(rows, 384).contiguous()


def scales_of(kind, most):
    """The scales of blocks whose largest magnitudes are these."""
    return torch.clamp_min(most / torch.tensor(kind.largest), LEAST_SCALE)


def some_scales(kind, n, seed=0):
    """Scales that encoding makes: any, powers of two, the least and the greatest, one column for each block."""
    most = random_bits(4 * n, seed).abs()
    most = most[most.isfinite() & (most > kind.largest * LEAST_SCALE)][:n]
    powers = kind.largest * torch.exp2(torch.arange(-126, 111).float())
    edges = torch.tensor([LEAST_SCALE * kind.largest, torch.finfo(torch.float32).max, kind.largest, 1.0])
    return scales_of(kind, torch.cat([most, powers, edges]))[:, None].expand(-1, 3).contiguous()


@both
def test_the_table_of_codes(kind):
    codes = torch.arange(256).to(torch.uint8)[None]
    found = kind.decode(codes, torch.ones(1, 2))
    assert torch.equal(found[0], kind.table)
    half = kind.table[:128] if kind is SIGNED else kind.table
    assert (half[1:] > half[:-1]).all()
    assert half[-1] == kind.largest
    assert half[0] == (0.0 if kind is SIGNED else 0.0625)
    if kind is SIGNED:
        assert torch.equal(kind.table[128:], -kind.table[:128])


@both
def test_what_was_decoded_is_encoded_to_the_same(kind):
    """Whatever is drawn: codes and scales are their own to the bit, for every code at every kind of scale."""
    scales = some_scales(kind, 500)
    codes = every_code(kind, len(scales))
    values = kind.decode(codes, scales)
    assert torch.equal(values, kind.table[codes.long()] * scales.repeat_interleave(128, 1))
    random = torch.randint(0, 2**16, codes.shape, generator=generator(), dtype=torch.int32)
    constant = [torch.full(codes.shape, d, dtype=torch.int32) for d in (0, 1, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)]
    for drawn in (None, random, *constant):
        again, scales_again = kind.encode(values, drawn)
        assert torch.equal(again, codes)
        assert torch.equal(scales_again, scales)


@both
def test_a_scale_is_reproduced_from_the_blocks_largest_value(kind):
    """All 2^23 significands: the scale of the largest decoded value is the scale, and that value is its own to a unit.

    Not so for any number as a scale, only for those that are the largest value divided by what the top code means.
    """
    largest = torch.tensor(kind.largest)
    for part in torch.arange(2**23, dtype=torch.int64).split(2**21):
        most = float32(part + (127 << 23))
        scales = most / largest
        decoded = largest * scales
        assert torch.equal(decoded / largest, scales)
        assert ((bits_of(decoded) - bits_of(most)).abs() <= 1).all()
    assert not torch.equal(largest * most / largest, most)


@both
def test_a_blocks_largest_value_gets_the_top_code(kind):
    most = random_bits(20_000).abs()
    most = most[most.isfinite() & (most > kind.largest * LEAST_SCALE)]
    values = torch.rand(len(most), 64, generator=generator()) * most[:, None]
    column = torch.arange(len(most)) % 64
    values[torch.arange(len(most)), column] = most
    for drawn in (None, 0, 0xFFFF):
        shaped = None if drawn is None else torch.full(values.shape, drawn, dtype=torch.int32)
        codes, scales = kind.encode(values, shaped)
        assert torch.equal(scales[:, 0], most / torch.tensor(kind.largest))
        assert (codes[torch.arange(len(most)), column] == (127 if kind is SIGNED else 255)).all()
        decoded = kind.decode(codes, scales)[torch.arange(len(most)), column]
        assert ((bits_of(decoded) - bits_of(most)).abs() <= 1).all()


def spacing(kind, values, scales):
    """From the code below a magnitude to the one above it, in float64: a 16th of the binade of |x| / scale + offset."""
    _, exponent = torch.frexp((values.abs().double() / scales).clamp_min(2.0 - kind.offset) + kind.offset)
    return torch.exp2(exponent - 5.0) * scales


@both
def test_codes_are_unbiased(kind):
    """The mean over all 2^16 draws is the value to 2^-16 of what lies between two codes.

    Half of that is the draw's own resolution, the rest is the rounding of z, whose last bit is 2^-19 of it.
    """
    worst = 0.0
    for seed, size in enumerate((1.0, 1e-30)):
        values = torch.exp2(-18 * torch.rand(128, generator=generator(seed)))
        values[:3] = torch.tensor([1.0, 1e-3, 2e-6])
        values *= size if kind is UNSIGNED else size * torch.randn(128, generator=generator(seed)).sign()
        total = torch.zeros(128, dtype=torch.float64)
        for drawn in DRAWS.split(2**11):
            shape = (len(drawn), 128)
            codes, scales = kind.encode(values.expand(shape), drawn[:, None].expand(shape))
            total += kind.decode(codes, scales).double().sum(0)
        scale = scales[0].double()
        wanted = values.double()
        if kind is UNSIGNED:
            wanted = wanted.clamp_min(0.0625 * scale)
        error = (total / 2**16 - wanted).abs() / spacing(kind, values, scale)
        worst = max(worst, error.max().item())
    assert 0 < worst < 2.0**-16


@both
def test_how_far_a_value_moves(kind):
    """Less than a code's spacing when drawn, half of it to the nearest: a 16th and a 32nd of |x| + offset × scale."""
    values = torch.randn(3000, 128, generator=generator()) * torch.exp2(-20 * torch.rand(3000, 128))
    if kind is UNSIGNED:
        values = values.square()
    random = torch.randint(0, 2**16, values.shape, generator=generator(), dtype=torch.int32)
    for drawn, part in ((None, 32), (random, 16)):
        codes, scales = kind.encode(values, drawn)
        scales = scales.double()
        lifted = values.double().abs()
        if kind is UNSIGNED:
            lifted = lifted.clamp_min(0.0625 * scales)
        error = (kind.decode(codes, scales.float()).double().abs() - lifted).abs()
        bound = (lifted + kind.offset * scales) / part * (1 + 2.0**-15)
        assert (error <= bound).all()
        assert (error >= 0.9 * bound).any()
        assert (error <= spacing(kind, lifted, scales) * 16 / part * (1 + 2.0**-15)).all()


def test_signs_stay_and_the_second_moment_never_reaches_zero():
    values = torch.exp2(-60 * torch.rand(99, 128, generator=generator()))
    random = torch.randint(0, 2**16, values.shape, generator=generator(), dtype=torch.int32)
    values[::3, 5:] = 1e-45
    values[::3, :5] = 0.0
    for size in (1.0, 1e-20, 1e-37, 1e38):
        for drawn in (None, random):
            decoded = codecs.decode_unsigned(*codecs.encode_unsigned(values * size, drawn))
            nonzero = (values * size).amax(1) > 0
            assert (decoded[nonzero] > 0).all()
            signed = values * size * torch.where(random < 2**15, -1.0, 1.0)
            codes, _ = codecs.encode_signed(signed, drawn)
            assert torch.equal(codes >= 128, signed.signbit())


def test_what_is_below_the_lowest_code_is_lifted_to_it():
    values = torch.zeros(2**16, 64)
    values[:, 0] = UNSIGNED_LARGEST
    values[:, 1] = 0.0625
    values[:, 2] = 0.0624
    values[:, 3] = 1e-45
    values[:, 4] = 0.0625 + 0.125 * 1.0001  # the second lowest code and a little
    codes, scales = codecs.encode_unsigned(values, DRAWS[:, None].expand(values.shape))
    assert torch.equal(scales, torch.ones(2**16, 1))
    assert (codes[:, [1, 2, 3, 5, 63]] == 0).all()
    assert (codes[:, 4] >= 1).all()


@both
@pytest.mark.parametrize("width", [1, 64, 128, 300])
def test_zeros_stay_zeros(kind, width):
    drawn = torch.full((3, width), 0xFFFF, dtype=torch.int32)
    for values in (torch.zeros(3, width), -torch.zeros(3, width)):
        if kind is UNSIGNED:
            values = values.abs()
        codes, scales = kind.encode(values, drawn)
        assert not scales.any()
        assert not kind.decode(codes, scales).any()
        assert kind.decode(codes, scales).isfinite().all()


@both
def test_a_subnormal_scale_is_the_least_normal_one(kind):
    for most in (2.0**-149, 2.0**-126, kind.largest * LEAST_SCALE / 3, kind.largest * 2.0**-127):
        values = torch.linspace(0, 1, 128)[None] * most
        values[0, -1] = most
        codes, scales = kind.encode(values)
        assert scales.item() == LEAST_SCALE
        decoded = kind.decode(codes, scales).double()
        wanted = values.double() if kind is SIGNED else values.double().clamp_min(0.0625 * LEAST_SCALE)
        assert ((decoded - wanted).abs() <= spacing(kind, values, LEAST_SCALE) / 2 * (1 + 2.0**-15)).all()
    assert kind.encode(torch.full((1, 64), kind.largest * 2.0**-125))[1].item() == 2.0**-125


@pytest.mark.parametrize(
    ("kind", "bad"),
    [(kind, bad) for kind in (SIGNED, UNSIGNED) for bad in (math.nan, -math.nan, math.inf, -math.inf)]
    + [(UNSIGNED, -1.0), (UNSIGNED, -1e-45)],
    ids=lambda x: getattr(x, "name", x),
)
def test_what_is_not_finite_marks_its_block_and_no_other(kind, bad):
    """Nor is a second moment below zero one that may be stored."""
    values = torch.rand(4, 300, generator=generator())
    drawn = torch.randint(0, 2**16, values.shape, generator=generator(), dtype=torch.int32)
    codes, scales = kind.encode(values, drawn)
    for row, column in ((0, 0), (1, 127), (2, 128), (3, 299)):
        spoilt = values.clone()
        spoilt[row, column] = bad
        found, found_scales = kind.encode(spoilt, drawn)
        block = column // 128
        assert found_scales[row, block].isnan()
        there = slice(128 * block, min(128 * block + 128, 300))
        assert not found[row, there].any()
        assert kind.decode(found, found_scales)[row, there].isnan().all()
        found[row, there], found_scales[row, block] = codes[row, there], scales[row, block]
        assert torch.equal(found, codes)
        assert torch.equal(found_scales, scales)


@both
@settings(deadline=None, max_examples=examples(150))
@given(st.data())
def test_a_block_of_any_numbers(kind, data):
    """A scale is the block's largest value over what the top code means; codes are those of the definition."""
    low = 0 if kind is UNSIGNED else None
    numbers = st.floats(low, None, width=32, allow_nan=False, allow_infinity=False)
    values = torch.tensor([data.draw(st.lists(numbers, min_size=1, max_size=140))], dtype=torch.float32)
    drawn = torch.tensor([[data.draw(st.integers(0, 2**16 - 1))]], dtype=torch.int32).expand(values.shape)
    for some in (None, drawn.contiguous()):
        codes, scales = kind.encode(values, some)
        decoded = kind.decode(codes, scales)
        for block, scale in zip(values[0].split(128), scales[0], strict=True):
            most = block.abs().max()
            assert scale == (torch.clamp_min(most / kind.largest, LEAST_SCALE) if most > 0 else 0)
        wide = scales.double().repeat_interleave(128, 1)[:, : values.shape[1]]
        there = wide > 0
        lifted = values.double().abs()
        if kind is UNSIGNED:
            lifted = lifted.clamp_min(0.0625 * wide)
        error = (decoded.double().abs() - lifted).abs()[there]
        allowed = (spacing(kind, lifted, wide.clamp_min(1e-300)) * (1 + 2.0**-15))[there]
        assert (error <= (allowed / 2 if some is None else allowed)).all()
        assert not decoded[~there].any()
        again, _ = kind.encode(decoded, some)
        if there.all() and (scales > LEAST_SCALE).all():
            assert torch.equal(again, codes)


# Codes in the engine


def read_moments(name, codes):
    """The values and the codes that engine `name` has of 8-bit state set by hand, from a step that moves nothing.

    exp_avg is seen in a parameter that moves by 0 - exp_avg, exp_avg_sq in amsgrad's maximum.
    """
    shape = codes["exp_avg_code"].shape
    still = {"betas": (STILL, STILL), "weight_decay": 0.0, "eps": 1.0, "state_format": "8bit"}
    m_alone = codes | {key: torch.zeros_like(codes[key]) for key in ("exp_avg_sq_code", "exp_avg_sq_scale")}
    first = stepped(name, torch.zeros(shape), torch.zeros(shape), m_alone, lr=RATE, **still)
    second = stepped(name, torch.zeros(shape), torch.zeros(shape), codes, lr=0.0, amsgrad=True, **still)
    return 0.0 - first["param"], second["max_exp_avg_sq"], second


@pytest.mark.parametrize("name", ENGINES)
def test_every_code_is_loaded_and_stored(name):
    codes = {}
    for kind in (SIGNED, UNSIGNED):
        scales = some_scales(kind, 100)[:200]
        codes[f"{kind.name}_scale"] = scales
        codes[f"{kind.name}_code"] = every_code(kind, len(scales))
    m, v, after = read_moments(name, codes)
    for kind, found in ((SIGNED, m), (UNSIGNED, v)):
        scales = codes[f"{kind.name}_scale"].repeat_interleave(128, 1)
        wanted = kind.table[codes[f"{kind.name}_code"].long()] * scales
        assert torch.equal(found, wanted), kind.name
    codes["exp_avg_code"][codes["exp_avg_code"] == 128] = 0  # -0 + (0 - -0) is 0
    assert_stored({key: after[key] for key in codes}, codes, name)


@pytest.mark.parametrize("width", [64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 511, 640, 1000])
def test_rows_shorter_than_a_block_and_tails(width):
    """No block reaches into another row: each scale is the largest value of its own elements over the top code's."""
    rows = -(-4096 // width)
    gradient = torch.randn(rows, width, generator=generator(width))
    gradient *= torch.exp2(torch.randint(-40, 40, (rows, 1), generator=generator(width)).float())
    gradient[rows // 2] = 0.0
    for name in ENGINES:
        found = assert_encodes(name, gradient, "8bit", betas=(0.0, 0.0))
        scales = found["exp_avg_scale"]
        assert scales.shape == (rows, -(-width // 128))
        for block, part in enumerate(gradient.split(128, 1)):
            assert torch.equal(scales[:, block], part.abs().amax(1) / SIGNED_LARGEST)


@pytest.mark.parametrize("blocks", range(1, 10))
@pytest.mark.parametrize("name", LEVELS)
def test_slices_of_any_number_of_blocks(name, blocks):
    """The CPU engine takes some blocks at a time: what is left at the end of a slice, and what marks one of them."""
    gradient = torch.randn(3, 128 * 14 + 7, generator=generator(blocks))
    gradient[0, 128 * blocks - 1] = math.nan
    gradient[1, : 128 * blocks] = 0.0
    with engine.cpu.forced_batch_elements(128 * blocks):
        assert_encodes(name, gradient, "8bit")


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("size", [1e-25, 1e-22, 1e-19, 1.0, 1e19])
def test_moments_of_every_size_are_encoded(name, size):
    """exp_avg_sq from 1e-50, which is zero, by way of least scales to 1e38."""
    gradient = torch.randn(16, 300, generator=generator()).clamp(-3.2, 3.2) * size
    gradient[3] *= 1e-4
    gradient[4, 128:] = 0.0
    found = assert_encodes(name, gradient, "8bit", betas=(0.0, 0.0))
    assert not found["exp_avg_scale"][4, 1:].any()
    assert not found["exp_avg_code"][4, 128:].any()
    assert not found["exp_avg_sq_scale"][4, 1:].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("name", ENGINES)
def test_a_gradient_that_is_not_finite_marks_its_block_and_no_other(name, bad):
    """3e38 is finite and its square is not: exp_avg_sq alone is marked."""
    gradient = torch.randn(20, 300, generator=generator())
    clean = assert_encodes(name, gradient, "8bit")
    for row, column in ((0, 0), (7, 128), (19, 299)):
        gradient[row, column] = bad
    found = assert_encodes(name, gradient, "8bit")
    for kind in (SIGNED, UNSIGNED):
        marked = torch.zeros(20, 3, dtype=torch.bool)
        if kind is UNSIGNED or not math.isfinite(bad):
            marked[[0, 7, 19], [0, 1, 2]] = True
        changed = marked.clone()
        changed[[0, 7, 19], [0, 1, 2]] = True
        elements = changed.repeat_interleave(128, 1)[:, :300]
        scales, codes = found[f"{kind.name}_scale"], found[f"{kind.name}_code"]
        assert torch.equal(scales.isnan(), marked)
        assert not codes[marked.repeat_interleave(128, 1)[:, :300]].any()
        assert torch.equal(scales[~changed], clean[f"{kind.name}_scale"][~changed])
        assert torch.equal(codes[~elements], clean[f"{kind.name}_code"][~elements])
    others = torch.ones(20, 300, dtype=torch.bool)
    others[[0, 7, 19], [0, 128, 299]] = False
    assert torch.equal(found["param"][others], clean["param"][others])


# Every engine, level, thread count and batch size


def adversarial(shape, seed, dtype=torch.float32, greatest=30):
    """Numbers that formats find hard: zeros, subnormals, 1e-30 to 10^greatest, and one in 2,000 not finite or huge."""
    n = math.prod(shape)
    if n == 0:
        return torch.zeros(shape, dtype=dtype)
    g = generator(seed)
    kind = torch.randint(0, 16, (n,), generator=g)
    moderate = torch.randn(n, generator=g) * 10 ** ((30 + greatest) * torch.rand(n, generator=g) - 30)
    row = torch.randn(n, generator=g)
    tiny = float32(torch.randint(0, 2**24, (n,), generator=g)) * torch.randn(n, generator=g).sign()
    values = torch.where(kind < 6, row, torch.where(kind < 12, moderate, torch.where(kind < 14, 0.0, tiny)))
    picked = torch.randint(0, n, (-(-n // 2000),), generator=g)
    special = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -1e30, 1e20])
    values[picked] = special[torch.randint(0, 6, picked.shape, generator=g)]
    return values.view(shape).to(dtype)


SHAPES = [(64, 64), (65, 65), (41, 100), (33, 127), (32, 128), (32, 129), (21, 200), (17, 255), (16, 257), (5, 1000)]
SHAPES += [(64, 2, 33), (3, 5), (7,), (0, 128), (), (1000,), (130,)]


class Problem:
    """Parameters of many shapes, with and without amsgrad, stepped again and again from the same hard state."""

    STEPS = 3

    def __init__(self, dtype, state_format, master_weights):
        groups = []
        reach = 4 if dtype == torch.float16 else 30
        for amsgrad in (False, True):
            params = [Parameter(adversarial(shape, 10 * k, dtype, reach)) for k, shape in enumerate(SHAPES)]
            params.append(Parameter(adversarial((70, 90), 1, dtype, reach).t()))
            for param in params:
                param.grad_dtype = None
            groups.append({"params": params, "amsgrad": amsgrad, "lr": 1e-2, "weight_decay": 0.1})
        groups[1] |= {"betas": (0.3, 0.95), "maximize": True}
        self.optimizer = optim.AdamW(groups, state_format=state_format, master_weights=master_weights)
        self.optimizer.init_state()
        self.params = [param for group in groups for param in group["params"]]
        self.gradients = [
            [self.gradient(k, step, dtype) for step in range(self.STEPS)] for k in range(len(self.params))
        ]
        self.now = []
        for k, param in enumerate(self.params):
            self.now.append({"param": param.detach()} | self.optimizer.state[param])
            self.set_by_hand(k, self.now[-1])
        self.start = [{key: value.clone() for key, value in own.items()} for own in self.now]

    def gradient(self, k, step, dtype):
        dtype = dtype if k % 3 else torch.float32
        greatest = 3 if dtype == torch.float16 else 18  # so that few squares are not finite
        return adversarial(self.params[k].shape, 1000 + 37 * step + k, dtype, greatest)

    def set_by_hand(self, k, own):
        g = generator(500 + k)
        for key, value in own.items():
            if key.endswith("_code"):
                value.copy_(torch.randint(0, 256, value.shape, generator=g))
            elif key == "residual":
                int16(value).copy_(torch.randint(-(2**15), 2**15, value.shape, generator=g))
            elif key == "step":
                value.fill_(k % 3)
            elif key not in ("param", "stream"):
                hard = adversarial(value.shape, 700 + k)
                value.copy_(hard.abs() if "_sq" in key or "_scale" in key else hard)
        if "master" in own and k % 2:  # as it would be if nobody had overwritten the parameter
            own["master"].copy_(own["param"].float() * (1 + 2.0**-13))

    def run(self):
        for own, start in zip(self.now, self.start, strict=True):
            for key, value in start.items():
                target = own[key]
                (int16(target) if key == "residual" else target).copy_(int16(value) if key == "residual" else value)
        for step in range(self.STEPS):
            for param, gradients in zip(self.params, self.gradients, strict=True):
                param.grad = gradients[step]
            self.optimizer.step()
        return [{key: value.clone() for key, value in own.items()} for own in self.now]


@pytest.mark.parametrize("state_format", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize(
    ("dtype", "master_weights"),
    [
        (torch.float32, True),
        (torch.bfloat16, True),
        (torch.bfloat16, False),
        (torch.float16, True),
        (torch.float16, False),
    ],
    ids=str,
)
def test_levels_threads_and_batches_give_the_references_bits(dtype, master_weights, state_format):
    problem = Problem(dtype, state_format, master_weights)
    with on("reference"):
        wanted = problem.run()
    finite = torch.cat([own["param"].isfinite().flatten() for own in wanted]).float().mean()
    assert 0.3 < finite < 1
    if state_format == "8bit":
        assert sum("exp_avg_code" in own for own in wanted) == 2 * 12
        scales = torch.cat([own["exp_avg_sq_scale"].flatten() for own in wanted if "exp_avg_sq_scale" in own])
        assert 0.2 < scales.isfinite().float().mean() < 1
    for level, threads, batch in itertools.product(LEVELS, [1, 2], [1, 100, 1 << 16]):
        torch.set_num_threads(threads)
        with engine.cpu.forced_simd_level(level), engine.cpu.forced_batch_elements(batch):
            found = problem.run()
        for k, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
            what = f"{level}, {threads} threads, batches of {batch}, parameter {k}"
            assert_stored(ours, theirs, what)


@pytest.mark.parametrize("state_format", ["bf16", "8bit"])
def test_what_is_stored_does_not_depend_on_the_order_in_memory(state_format, engine_name):
    values, gradient = torch.randn(2, 66, 130, generator=generator())
    level = LEVELS[-1] if engine_name == "cpu" else "reference"
    with contextlib.ExitStack() as stack:
        stack.enter_context(engine.cpu.forced_batch_elements(1000))
        plain = stepped(level, values, gradient, state_format=state_format)
        turned = stepped(level, values.t().contiguous().t(), gradient.t().contiguous().t(), state_format=state_format)
    assert not turned["param"].is_contiguous()
    assert_stored({key: value.contiguous() for key, value in turned.items()}, plain)
