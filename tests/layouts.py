"""Ways in which tensors lie in memory, and steps of them that must give the bits of contiguous copies."""

import math

import torch
from hypothesis import strategies as st
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, draw, on, results, same
from lucid import engine

STEPS = 3


def contiguous(tensor):
    return tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def as_contiguous(start, gradients, **options):
    """The results of contiguous copies on the reference engine."""
    param = Parameter(contiguous(start))
    optimizer = optim.AdamW([param], **options)
    with on("reference"):
        for gradient in gradients:
            param.grad_dtype = None
            param.grad = contiguous(gradient)
            optimizer.step()
    return results(optimizer)


def check(view, gradients, base=None, moments=None, **options):
    """Step `view` in place with `gradients`; its numbers must be right and the rest of `base` untouched."""
    wanted = as_contiguous(view, gradients, **options)
    around = None if base is None else base.clone()
    param = Parameter(view)
    optimizer = optim.AdamW([param], **options)
    optimizer.init_state()
    if moments is not None:
        for key, slot in zip([key for key in optimizer.state[param] if key != "step"], moments, strict=False):
            optimizer.state[param][key] = slot.zero_()
    for gradient in gradients:
        param.grad_dtype = None
        param.grad = gradient
        optimizer.step()
    assert param.data_ptr() == view.data_ptr()
    assert_same(results(optimizer), wanted)
    if base is not None:
        after = base.clone()
        own = view.detach().clone()
        inside = torch.as_strided(after, view.shape, view.stride(), view.storage_offset())
        assert same(inside, own)
        inside.copy_(torch.as_strided(around, view.shape, view.stride(), view.storage_offset()))
        assert same(after, around), "memory around the parameter was written"


def gradients_like(tensor, dtype=None):
    return [draw(50 + k, tensor.shape, dtype or tensor.dtype) for k in range(STEPS)]


# Any layout of anything


@st.composite
def layouts(draw_from, ndim):
    """An order of dimensions in memory, and for each how far apart its elements are and how far in they begin."""
    order = draw_from(st.permutations(range(ndim)))
    gaps = st.tuples(st.integers(1, 3), st.integers(0, 2))
    return order, draw_from(st.lists(gaps, min_size=ndim, max_size=ndim))


def laid_out(values, layout):
    """A view with `values` in its layout, and the buffer it lies in."""
    order, gaps = layout
    sizes = [(gaps[k][1] + values.shape[k] * gaps[k][0]) for k in order]
    base = draw(99, [math.prod(sizes) + 1], torch.float64).to(values.dtype)
    whole = base[1:].view(sizes)
    for dim, k in enumerate(order):
        whole = whole.narrow(dim, gaps[k][1], values.shape[k] * gaps[k][0])
        whole = whole[(slice(None),) * dim + (slice(None, None, gaps[k][0]),)]
    view = whole.permute([order.index(k) for k in range(len(order))])
    view.copy_(values)
    return view, base


def step_in_any_layout(data):
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
    kinds = [torch.float32, torch.float64, torch.complex64]
    dtype = data.draw(st.sampled_from(kinds))
    others = [torch.complex64, torch.complex128] if dtype.is_complex else [torch.float32, torch.float16, torch.float64]
    gradient_dtype = data.draw(st.sampled_from([dtype, *others]))
    one = layouts(len(shape))
    view, base = laid_out(draw(0, shape, dtype), data.draw(one))
    gradients = [laid_out(g, data.draw(one))[0] for g in gradients_like(view, dtype)]
    gradients = [g if g.dtype == gradient_dtype else g.to(gradient_dtype) for g in gradients]
    moments = [laid_out(torch.zeros(shape, dtype=dtype), data.draw(one)) for _ in range(3)]
    rests = [rest.clone() for _, rest in moments]
    torch.set_num_threads(data.draw(st.sampled_from([1, 2])))
    batch = data.draw(st.sampled_from([1, 5, 64, 65_536]))
    level = data.draw(st.sampled_from(engine.cpu.simd_levels()))
    with engine.cpu.forced_batch_elements(batch), engine.cpu.forced_simd_level(level):
        check(view, gradients, base, [slot for slot, _ in moments], amsgrad=data.draw(st.booleans()))
    for (slot, rest), before in zip(moments, rests, strict=True):
        where = (slot.shape, slot.stride(), slot.storage_offset())
        rest.as_strided(*where).copy_(before.as_strided(*where))
        assert torch.equal(rest, before), "memory around the state was written"


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


DENSE = {
    "transposed": lambda: draw(0, (67, 43)).t(),
    "permuted": lambda: draw(0, (5, 6, 7, 8)).permute(2, 0, 3, 1),
    "channels-last": lambda: channels_last(draw(0, (4, 6, 5, 3))),
    "channels-last 3d": lambda: draw(0, (2, 3, 4, 5, 6)).contiguous(memory_format=torch.channels_last_3d),
    "8-D": lambda: draw(0, (2, 3, 1, 2, 3, 2, 2, 3)).permute(7, 0, 3, 5, 1, 6, 2, 4),
    "odd stride of one": lambda: draw(0, (12,)).as_strided((3, 1, 4), (4, 999, 1)),
    "zero stride of one": lambda: draw(0, (12,)).as_strided((1, 3, 4), (0, 4, 1)),
    "0-dim": lambda: draw(0, ()),
    "one element": lambda: draw(0, (1, 1, 1)),
    "empty": lambda: draw(0, (0,)),
    "empty in the middle": lambda: draw(0, (3, 0, 5)),
    "empty, odd strides": lambda: draw(0, (12,)).as_strided((0, 4), (0, 0)),
    "64-D": lambda: draw(0, (1,) * 30 + (2, 3) + (1,) * 31 + (2,)),
}

CUTS = {
    "columns": lambda base: base[:, ::2],
    "block": lambda base: base[1::3, 2:5],
    "column": lambda base: base[:, 7],
    "row": lambda base: base[3],
    "transposed": lambda base: base.t()[::5, 1:],
    "windows": lambda base: base.unfold(1, 3, 4),
    "empty": lambda base: base[5:5],
    "element": lambda base: base[2, 3],
}
