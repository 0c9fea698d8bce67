"""What the tests of state formats share: a model with every kind of parameter in a format, and a step in any layout."""

import torch
from hypothesis import strategies as st
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, draw, on, peek, results
from lucid import engine

HALVES = (torch.bfloat16, torch.float16)
FORMATS = ["fp32", "bf16", "8bit"]
SMALL_FORMATS = ["bf16", "8bit"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64]
MOMENTS = {"exp_avg", "exp_avg_sq"}
CODED = {"exp_avg_code", "exp_avg_scale", "exp_avg_sq_code", "exp_avg_sq_scale"}
MATRIX = (64, 80)  # quantized


def raw(rows):
    """`results` with 16-bit numbers as bits, among them residuals, whose bits are no numbers."""
    return [{key: x.view(torch.int16) if x.dtype in HALVES else x for key, x in row.items()} for row in rows]


def bits_of(optimizer):
    return raw(results(optimizer))


def entry_of(param, **options):
    """The state that is made for a parameter."""
    optimizer = optim.AdamW([param], **options)
    optimizer.init_state()
    return optimizer.state[param]


class World:
    """Parameters of every layout, in one dtype; gradients depend on the step's number only."""

    def __init__(self, dtype=torch.float32, order=None, **options):
        self.named = {name: Parameter(view) for name, view in self.layouts(dtype).items()}
        names = list(self.named) if order is None else order
        groups = [[(name, self.named[name]) for name in part] for part in (names[::2], names[1::2])]
        self.optimizer = optim.AdamW(
            [{"params": groups[0]}, {"params": groups[1], "amsgrad": True}], lr=0.01, **options
        )
        self.done = 0

    @staticmethod
    def layouts(dtype):
        return {
            "contiguous": draw(0, MATRIX).to(dtype),
            "transposed": draw(1, (80, 64)).to(dtype).t(),
            "channels-last": draw(2, (64, 8, 3, 3)).to(dtype).contiguous(memory_format=torch.channels_last),
            "strided": draw(3, (35, 400)).to(dtype)[2:, 1:390:3],
            "wide": draw(4, (3, 2000)).to(dtype),
            "vector": draw(5, (131,)).to(dtype),
            "small": draw(6, (5, 7)).to(dtype).t(),
            "0-dim": draw(7, ()).to(dtype),
            "empty": draw(8, (0, 70)).to(dtype),
        }

    def step(self):
        for index, (_, param) in enumerate(sorted(self.named.items())):
            param.grad_dtype = None
            param.grad = draw(1000 + 100 * self.done + index, param.shape).to(param.dtype) * 10.0 ** (self.done % 5 - 3)
        self.optimizer.step()
        self.done += 1

    def run(self, steps):
        for _ in range(steps):
            self.step()
        return self

    def bits(self):
        state = peek(self.optimizer)
        return raw(
            [{"param": p.detach().clone()} | {k: x.clone() for k, x in state[p].items()} for p in self.named.values()]
        )


@st.composite
def laid_out(draw_from, values):
    """A view with `values` whose dimensions lie in any order, elements apart; and the buffer around it."""
    order = draw_from(st.permutations(range(values.dim())))
    gaps = [draw_from(st.tuples(st.sampled_from([1, 1, 2, 3]), st.integers(0, 2))) for _ in order]
    base = torch.full([gaps[k][1] + values.shape[k] * gaps[k][0] for k in order], 7.0).to(values.dtype)
    view = base
    for dim, k in enumerate(order):
        view = view.narrow(dim, gaps[k][1], values.shape[k] * gaps[k][0])[
            (slice(None),) * dim + (slice(None, None, gaps[k][0]),)
        ]
    view = view.permute([order.index(k) for k in range(len(order))])
    view.copy_(values)
    return view, base


def step_any_format_in_any_layout(data, names):
    """The bits of contiguous copies on the reference, and nothing written around."""
    shapes = [(64, 64), (33, 131), (2, 3000), (64, 9, 11), (8, 2, 4, 70), (5, 7), (3, 2, 4), (19,), (), (0, 4)]
    shape = data.draw(st.sampled_from(shapes))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    gradient_dtype = data.draw(st.sampled_from([dtype, torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    options = {
        "state_format": data.draw(st.sampled_from(FORMATS)),
        "master_weights": data.draw(st.booleans()),
        "amsgrad": data.draw(st.booleans()),
        "betas": data.draw(st.sampled_from([(0.9, 0.999), (0.3, 0.4)])),
        "maximize": data.draw(st.booleans()),
    }
    start = draw(0, shape).to(dtype)
    gradients = [(draw(50 + k, shape) * 10.0 ** (k - 1)).to(gradient_dtype) for k in range(3)]

    def run(view, gradients, move=None):
        param = Parameter(view)
        param.grad_dtype = None
        optimizer = optim.AdamW([param], **options)
        optimizer.init_state()
        if move is not None:
            move(optimizer.state[param])
        for gradient in gradients:
            param.grad = gradient
            optimizer.step()
        assert param.data_ptr() == view.data_ptr()
        return bits_of(optimizer)

    with on("reference"):
        wanted = run(start.clone(), gradients)
    bases = []

    def placed(values):
        view, base = data.draw(laid_out(values))
        outside = torch.ones_like(base, dtype=torch.bool)
        outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
        bases.append((base, outside))
        return view

    def move(entry):
        for key in entry.keys() - CODED - {"step", "stream"}:
            entry[key] = placed(entry[key])

    torch.set_num_threads(data.draw(st.sampled_from([1, 2])))
    level = data.draw(st.sampled_from(engine.cpu.simd_levels()))
    batch = data.draw(st.sampled_from([1, 5, 64, 1000, 65_536]))
    name = data.draw(st.sampled_from(names))
    with on(name), engine.cpu.forced_batch_elements(batch), engine.cpu.forced_simd_level(level):
        assert_same(run(placed(start), [placed(gradient) for gradient in gradients], move), wanted)
    for base, outside in bases:
        assert (base[outside] == 7.0).all(), "memory around was written"
