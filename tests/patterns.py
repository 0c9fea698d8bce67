"""Numbers over the whole exponent range, with subnormals, zeros, infinities and NaN, in parameters of every length."""

import itertools
import math

import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import canonical
from lucid import engine

LEVELS = engine.cpu.simd_levels()
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
REAL_GRADIENTS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
COMPLEX_GRADIENTS = [torch.complex64, torch.complex128]
BATCHES = [1, 7, 64, 1000, 1 << 16]
BETAS = [(0.9, 0.999), (0.0, 0.0), (0.5, 0.4999), (0.3, 0.95), (0.9999999, 0.5), (0.0, 0.9999999)]
# Around every vector width there is (4, 8 and 16 floats), past two and eight of the widest.
LENGTHS = [0, 1, 3, 4, 5, 8, 9, 16, 17, 33, 130, 517]


def real(dtype):
    return dtype.to_real() if dtype.is_complex else dtype


def patterns(generator, n, dtype):
    """`n` numbers: a third any bits at all, a third of moderate size, a third near and below the least normal."""
    if dtype.is_complex:
        return torch.complex(*(patterns(generator, n, real(dtype)) for _ in range(2)))
    if dtype.itemsize == 2:
        drawn = torch.randint(-(2**15), 2**15, (n,), generator=generator, dtype=torch.int16)
        return drawn.view(dtype)
    info = torch.finfo(dtype)
    whole = torch.int32 if dtype == torch.float32 else torch.int64
    bounds = torch.iinfo(whole)
    anything = torch.randint(bounds.min, bounds.max, (n,), generator=generator, dtype=whole).view(dtype)
    normal = torch.randn(n, generator=generator, dtype=dtype)
    moderate = normal * torch.exp2(torch.randint(-30, 30, (n,), generator=generator).to(dtype))
    tiny = normal * info.tiny * torch.exp2(torch.randint(-20, 20, (n,), generator=generator).to(dtype))
    special = torch.tensor(
        [0.0, -0.0, info.tiny, -info.tiny, info.smallest_normal / 8, info.max, math.inf, -math.inf, math.nan, 1.0],
        dtype=dtype,
    )
    kind = torch.randint(0, 30, (n,), generator=generator)
    values = torch.where(kind < 5, anything, torch.where(kind < 22, moderate, tiny))
    picked = special[torch.randint(0, len(special), (n,), generator=generator)]
    return torch.where(kind == 29, picked, values)


class Problem:
    """Parameters of many lengths in several groups, to be stepped again and again from the same start.

    All parameters lie in one buffer, all first moments in another and so on: at every alignment, with a few numbers
    between them that no step may touch.
    """

    STEPS = 3

    def __init__(self, dtype, groups, gradient_dtypes):
        generator = torch.Generator().manual_seed(3)
        keys = ["param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
        gaps = dict(zip(keys, (1, 2, 3, 1), strict=True))
        rows = list(itertools.product(groups, LENGTHS, gradient_dtypes))
        self.start = {}
        for key in keys:
            flat = patterns(generator, sum(length + gaps[key] for _, length, _ in rows), dtype)
            if key.endswith("_sq"):  # squares of nothing, but never negative
                parts = torch.view_as_real(flat) if dtype.is_complex else flat
                parts.abs_()
            self.start[key] = flat
        self.start["step"] = (torch.arange(len(rows)) % 3).float()
        self.now = {key: flat.clone() for key, flat in self.start.items()}

        self.params, self.gradients = [], []
        at = dict.fromkeys(keys, 1)
        optimizer_groups = [{"params": []} | options for options in groups]
        state = {}
        for index, (options, length, gradient_dtype) in enumerate(rows):
            own = {key: self.now[key][at[key] : at[key] + length] for key in keys}
            for key in keys:
                at[key] += length + gaps[key]
            param = Parameter(own.pop("param"))
            param.grad_dtype = None
            if not options["amsgrad"]:
                del own["max_exp_avg_sq"]
            state[param] = {"step": self.now["step"][index]} | own
            drawn = patterns(generator, self.STEPS * length + 2, gradient_dtype)
            self.gradients.append([drawn[k * length + k : (k + 1) * length + k] for k in range(self.STEPS)])
            self.params.append(param)
            optimizer_groups[groups.index(options)]["params"].append(param)
        self.optimizer = optim.AdamW(optimizer_groups)
        self.optimizer.state.update(state)

    def run(self):
        """The bits of every buffer after all steps."""
        for key, flat in self.start.items():
            self.now[key].copy_(flat)
        for step in range(self.STEPS):
            for param, gradients in zip(self.params, self.gradients, strict=True):
                param.grad = gradients[step]
            self.optimizer.step()
        return {key: canonical(flat) for key, flat in self.now.items()}


# Every engine, level, thread count and batch size


def whole_grid(dtype):
    """A problem of every kind of group, length and gradient."""
    others = itertools.cycle(
        [(1e-3, 0.01, 1e-8), (0.1, 0.0, 0.0), (1e30, 1e-3, 1e-40), (0.0, 0.1, 1e-8), (2.0, 3.0, 1e-3)]
    )
    groups = []
    for betas, maximize, amsgrad in itertools.product(BETAS, [False, True], [False, True]):
        lr, weight_decay, eps = next(others)
        groups.append(
            {"betas": betas, "maximize": maximize, "amsgrad": amsgrad}
            | {"lr": lr, "weight_decay": weight_decay, "eps": eps}
        )
    return Problem(dtype, groups, COMPLEX_GRADIENTS if dtype.is_complex else REAL_GRADIENTS)
