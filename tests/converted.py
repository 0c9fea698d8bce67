"""Optimizers with state in every format, and their moments as numbers, for tests that load one into another."""

import itertools

import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import draw, results
from lucid.engine import codecs

FORMATS = ["fp32", "bf16", "8bit"]
HALVES = (torch.bfloat16, torch.float16)
DTYPES = [torch.float32, *HALVES]
KINDS = list(itertools.product(DTYPES, FORMATS))
NAMES = [f"{str(dtype)[6:]}-{state_format}" for dtype, state_format in KINDS]
MOMENTS = {"exp_avg", "exp_avg_sq"}
CODED = {"exp_avg_code", "exp_avg_scale", "exp_avg_sq_code", "exp_avg_sq_scale"}


def values(dtype=torch.float32):
    """Two matrices that are quantized, one of them in another order of memory, and what is not."""
    return {
        "matrix": draw(0, (64, 80)).to(dtype),
        "transposed": draw(1, (150, 64)).to(dtype).t(),
        "small": draw(2, (5, 7)).to(dtype).t(),
        "vector": draw(3, (300,)).to(dtype),
        "0-dim": draw(4, ()).to(dtype),
        "empty": draw(5, (0, 3)).to(dtype),
    }


def made(dtype=torch.float32, make=optim.AdamW, **options):
    params = {name: Parameter(value) for name, value in values(dtype).items()}
    return make(list(params.items()), **{"lr": 0.01} | options), params


def train(optimizer, params, start, stop):
    for step in range(start, stop):
        for index, param in enumerate(params.values()):
            param.grad = draw(1000 + 10 * step + index, param.shape).to(param.dtype) * 10.0 ** (step % 4 - 2)
        optimizer.step()
    return optimizer, params


def trained(dtype=torch.float32, make=optim.AdamW, steps=3, **options):
    return train(*made(dtype, make, **options), 0, steps)


def raw(entry):
    """A state's tensors with 16-bit numbers as bits, among them residuals, whose bits are no numbers."""
    return {key: x.detach().view(torch.int16) if x.dtype in HALVES else x.detach() for key, x in entry.items()}


def bits_of(optimizer):
    return [raw(row) for row in results(optimizer)]


def moments(entry):
    """Both moments of a state as float32."""
    if "exp_avg_code" in entry:
        return (
            codecs.decode_signed(entry["exp_avg_code"], entry["exp_avg_scale"]),
            codecs.decode_unsigned(entry["exp_avg_sq_code"], entry["exp_avg_sq_scale"]),
        )
    return entry["exp_avg"].float(), entry["exp_avg_sq"].float()


def encoded(m, v, own):
    """What the two are in the format of the state `own`, rounded to the nearest."""
    if "exp_avg_code" in own:
        (m_code, m_scale), (v_code, v_scale) = codecs.encode_signed(m), codecs.encode_unsigned(v)
        return {
            "exp_avg_code": m_code,
            "exp_avg_scale": m_scale,
            "exp_avg_sq_code": v_code,
            "exp_avg_sq_scale": v_scale,
        }
    return {"exp_avg": m.to(own["exp_avg"].dtype), "exp_avg_sq": v.to(own["exp_avg_sq"].dtype)}


def keys_of(dtype, state_format, name, amsgrad):
    quantized = state_format == "8bit" and name in ("matrix", "transposed")
    keys = {"step"} | (CODED if quantized else MOMENTS) | ({"max_exp_avg_sq"} if amsgrad else set())
    keys |= {"stream"} if quantized or state_format == "bf16" else set()
    return keys | {torch.bfloat16: {"residual"}, torch.float16: {"master"}}.get(dtype, set())


# From any of ours to any of ours


def moment_keys(entry):
    return CODED & entry.keys() or {(key, entry[key].dtype) for key in MOMENTS}


def state_of(param, state_format, amsgrad):
    optimizer = optim.AdamW([param], state_format=state_format, amsgrad=amsgrad)
    optimizer.init_state()
    return optimizer.state[param]


# Master weights


def joined(param, residual):
    return ((param.view(torch.int16).int() << 16) + residual.view(torch.int16).int()).view(torch.float32)
