"""Engine steps that are chosen so that what is stored is known, in the parameter or in the moments: see `delivered` and
`assert_encodes`.
"""

import math

import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import canonical, on
from lucid import engine
from lucid.engine import codecs
from lucid.engine.shards import WHOLE

LEVELS = engine.cpu.simd_levels()
ENGINES = [*LEVELS, "reference"]
LOWER = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
LEAST_SCALE = 2.0**-126
SIGNED_LARGEST, UNSIGNED_LARGEST = 494.0, 126974.0625
DRAWS = torch.arange(2**16, dtype=torch.int32)

# A zero gradient leaves moments as they are, to the bit, where 1 - β is less than half a float32 unit; the learning
# rate that makes k = α / (1 - β1) one at the first step.
STILL = 1 - 2.0**-53
RATE = -math.expm1(math.log(STILL))


def at(name):
    """The context in which steps run on the reference engine, or on the CPU engine at SIMD level `name`."""
    return on("reference") if name == "reference" else engine.cpu.forced_simd_level(name)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def int16(x):
    return x.detach().view(torch.int16)


def float32(bits):
    """The float32 numbers with these bits (int64, 0 to 2^32 - 1)."""
    return torch.as_tensor(bits).to(torch.int32).view(torch.float32)


def bits_of(x):
    return x.contiguous().view(torch.int32).long() & 0xFFFFFFFF


def random_bits(n, seed=0):
    """`n` float32 numbers of any bits at all."""
    return torch.randint(-(2**31), 2**31, (n,), generator=generator(seed)).to(torch.int32).view(torch.float32)


def patterns(key, tensor):
    """The bits of what is stored, every NaN the same but in a residual, which is no number."""
    if key == "residual":
        return int16(tensor).flatten()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        return torch.where(tensor.isnan(), -1, int16(tensor)).flatten()
    return canonical(tensor)


def assert_stored(found, wanted, what=""):
    """Compare two parameters with their states, to the bit."""
    assert found.keys() == wanted.keys(), what
    for key in found:
        assert found[key].dtype == wanted[key].dtype, f"{what}: {key}"
        ours, theirs = patterns(key, found[key]), patterns(key, wanted[key])
        if not torch.equal(ours, theirs):
            where = (ours != theirs).nonzero().flatten()
            raise AssertionError(
                f"{what}: {len(where)} of {len(ours)} other bits in {key} {tuple(found[key].shape)}, at "
                f"{where[:5].tolist()}: {ours[where[:5]].tolist()}, expected {theirs[where[:5]].tolist()}"
            )


def stepped(name, param, gradient, state=None, **options):
    """A parameter with its state after one step on engine `name`, from `state` set by hand."""
    theta = Parameter(param.clone())
    theta.grad_dtype = None
    theta.grad = gradient
    optimizer = optim.AdamW([theta], **options)
    optimizer.init_state()
    own = optimizer.state[theta]
    for key, value in (state or {}).items():
        if key == "residual":
            int16(own[key]).copy_(int16(value))
        else:
            own[key].copy_(value)
    with at(name):
        optimizer.step()
    return {"param": theta.detach()} | own


def delivered(name, values, dtype, **options):
    """What engine `name` stores for a parameter whose new value is 0 - (-value), by way of a first moment."""
    state = {"exp_avg": -values}
    options |= {"betas": (STILL, STILL), "lr": RATE, "eps": 1.0, "weight_decay": 0.0}
    return stepped(name, torch.zeros(values.shape, dtype=dtype), torch.zeros(values.shape), state, **options)


def unmoved(name, param, state, **options):
    """What engine `name` stores for a parameter that is finite and does not move."""
    return stepped(name, param, torch.zeros(param.shape), state, lr=0.0, weight_decay=0.0, **options)


# Codes in the engine


def encoded(state_format, wide, stream, step):
    """What the codecs make of float32 moments."""
    m, v = wide["exp_avg"], wide["exp_avg_sq"]
    drawn = codecs.draws(stream, step, WHOLE.numbers(m.shape, m.device))
    if state_format == "bf16":
        rounded = codecs.rounded_to_bfloat16
        return {"exp_avg": rounded(m, drawn), "exp_avg_sq": rounded(v, drawn, positive=True)}
    m_codes, m_scales = codecs.encode_signed(m, drawn)
    v_codes, v_scales = codecs.encode_unsigned(v, drawn)
    return {
        "exp_avg_code": m_codes,
        "exp_avg_scale": m_scales,
        "exp_avg_sq_code": v_codes,
        "exp_avg_sq_scale": v_scales,
    }


def assert_encodes(name, gradient, state_format, **options):
    """That a first step stores what the codecs make of a float32 step's moments; return what it stores."""
    param = torch.zeros(gradient.shape)
    wide = stepped(name, param, gradient, **options)
    found = stepped(name, param, gradient, state_format=state_format, seed=11, **options)
    wanted = encoded(state_format, wide, int(found["stream"]), 1)
    wanted = {key: wide.get(key, found[key]) for key in found} | wanted
    assert_stored(found, wanted, f"{name}: {tuple(gradient.shape)}")
    return found
