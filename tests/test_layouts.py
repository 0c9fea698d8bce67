"""Guards that memory layout changes no number and no memory but the parameter's own.

torch's fused step ignores strides: it writes between the elements of a strided view and pairs elements with other
elements' gradients. Here every layout must give the bits of contiguous copies on the reference engine, and
whatever lies around a view must stay as it was. What cannot be updated is refused before anything is written.
"""

import contextlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

import lucid.optim as optim
from bits import World, assert_same, draw, in_child, on, results, same, snapshot
from layouts import CUTS, DENSE, STEPS, as_contiguous, check, contiguous, gradients_like, step_in_any_layout
from lucid import engine
from quick import examples

# Any layout of anything


@settings(max_examples=examples(150), deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_layout_of_parameter_gradient_and_state(data):
    step_in_any_layout(data)


@pytest.mark.parametrize("other", [*DENSE, "contiguous", "expanded"])
@pytest.mark.parametrize("make", DENSE.values(), ids=DENSE.keys())
def test_dense_layouts(make, other):
    view = make()
    gradients = gradients_like(view)
    if other == "expanded":
        gradients = [g.reshape(-1)[:1].reshape(()).expand(view.shape) if g.numel() else g for g in gradients]
    elif other != "contiguous" and DENSE[other]().dim() == view.dim():
        order = sorted(range(view.dim()), key=lambda k: -DENSE[other]().stride(k))
        gradients = [
            g.permute(order).contiguous().permute([order.index(k) for k in range(view.dim())]) for g in gradients
        ]
    check(view, gradients, amsgrad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_strided_views_and_nothing_between(cut, dtype):
    base = draw(0, (41, 700), dtype)
    view = cut(base)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with engine.cpu.forced_batch_elements(129):
            check(view, gradients_like(view), base)


def test_the_real_part_of_a_complex_tensor():
    base = draw(0, (9, 11), torch.complex64)
    imaginary = base.imag.clone()
    check(base.real, gradients_like(base.real))
    assert torch.equal(base.imag, imaginary)


def test_addresses_beyond_two_to_the_31_elements(tmp_path):
    """Offsets within a tensor reach 2³¹ elements and 2³³ bytes and more; the file behind it stays empty.

    A tensor *of* 2³¹ elements would need 32 GiB with its state. Counting elements is covered otherwise: all counts,
    offsets and strides in csrc are int64_t, and -Wconversion -Werror refuses a narrower one.
    """
    size = 3 * 2**30 + 64
    base = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float32)
    for view in (
        base.as_strided((4, 5), (2**30, 7)),
        base.as_strided((5, 4), (7, 2**30), 3),
        base[2**31 + 11 : 2**31 + 40],
    ):
        wanted = as_contiguous(view, gradients_like(view))
        far = base.as_strided((4, 5), (2**30, 7), 13) if view.dim() == 2 and view.shape[0] == 4 else None
        param = Parameter(view)
        optimizer = optim.AdamW([param])
        for gradient in gradients_like(view):
            param.grad = gradient if far is None else far.copy_(gradient)
            with pytest.raises(ValueError, match="share memory") if far is not None else contextlib.nullcontext():
                optimizer.step()
            if far is not None:
                param.grad = gradient
                optimizer.step()
        assert_same(results(optimizer), wanted)


def test_memory_that_is_not_aligned(engine_name):
    """Either right or refused with nothing written, not a crash."""
    buffer = bytearray(41)
    view = torch.frombuffer(memoryview(buffer)[1:], dtype=torch.float32)
    view.copy_(draw(0, (10,)))
    wanted = as_contiguous(view, gradients_like(view))
    param = Parameter(view)
    optimizer = optim.AdamW([param])
    with on(engine_name):
        for gradient in gradients_like(view):
            param.grad = gradient
            before = snapshot(optimizer)
            try:
                optimizer.step()
            except ValueError as error:
                assert "multiple of its element's size" in str(error)  # noqa: PT017
                assert snapshot(optimizer) == before
                return
    assert_same(results(optimizer), wanted)


# State in other strides


@pytest.mark.parametrize("make", DENSE.values(), ids=DENSE.keys())
def test_loaded_state_in_other_strides(make, engine_name):
    view = make()
    gradients = gradients_like(view)
    wanted = as_contiguous(view, gradients, amsgrad=True)
    param = Parameter(view)
    with on(engine_name):
        optimizer = optim.AdamW([param], amsgrad=True)
        param.grad = gradients[0]
        optimizer.step()
        saved = optimizer.state_dict()
        for key, slot in saved["state"][0].items():
            backwards = tuple(range(slot.dim() - 1, -1, -1))
            saved["state"][0][key] = slot.permute(backwards).contiguous().permute(backwards)
        optimizer = optim.AdamW([param], amsgrad=True)
        optimizer.load_state_dict(saved)
        for gradient in gradients[1:]:
            param.grad = gradient
            optimizer.step()
    assert_same(results(optimizer), wanted)


# Shared memory


@pytest.mark.parametrize(
    "make",
    [
        lambda: draw(0, (3, 1)).expand(3, 4),
        lambda: draw(0, ()).expand(5),
        lambda: draw(0, (10,)).as_strided((4, 3), (2, 1)),
        lambda: draw(0, (10,)).unfold(0, 3, 1),
        lambda: draw(0, (20,)).as_strided((3, 3), (2, 4)),
        lambda: draw(0, (3, 1), torch.complex64).expand(3, 4),
    ],
    ids=["expanded", "0-dim expanded", "overlapping rows", "windows", "incommensurate", "complex"],
)
@pytest.mark.parametrize("warm", [False, True])
def test_overlapping_parameters_are_refused(make, warm, engine_name):
    view = make()
    other = Parameter(draw(1, (5,)))
    param = Parameter(contiguous(view) if warm else view)
    optimizer = optim.AdamW([other, param])
    other.grad, param.grad = draw(2, (5,)), draw(3, view.shape, view.dtype)
    with on(engine_name):
        if warm:
            optimizer.step()
            param.data = view
        before = snapshot(optimizer, view)
        with pytest.raises(ValueError, match=r"several elements at the same address.*contiguous"):
            optimizer.step()
        assert snapshot(optimizer, view) == before


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((2, 3), (3, 2)), ((3, 2), (2, 3)), ((2, 2, 3), (1, 6, 2)), ((2, 5), (5, 2)), ((4, 1, 3), (1, 1, 5))],
    ids=str,
)
def test_strides_that_interleave_but_meet_nowhere(shape, strides):
    base = draw(0, (64,))
    view = base.as_strided(shape, strides, 3)
    check(view, gradients_like(view), base)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    "overlapping",
    [
        lambda param, entry: param.data,
        lambda param, entry: param.data.flip(0).untyped_storage() and param.data.t(),
        lambda param, entry: entry["exp_avg"],
        lambda param, entry: entry["exp_avg_sq"].t(),
    ],
    ids=["the parameter", "the parameter transposed", "exp_avg", "exp_avg_sq transposed"],
)
def test_a_gradient_in_the_parameters_or_its_states_memory_is_refused(overlapping, warm):
    other, param = Parameter(draw(1, (5,))), Parameter(draw(0, (6, 6)))
    optimizer = optim.AdamW([other, param])
    other.grad, param.grad = draw(2, (5,)), draw(3, (6, 6))
    optimizer.step() if warm else optimizer.init_state()
    param.grad = overlapping(param, optimizer.state[param])
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError,
        match=r"parameter 1 of group 0.*(its gradient and .*|and its gradient) share memory",
    ):
        optimizer.step()
    assert snapshot(optimizer) == before
    param.grad = draw(4, (6, 6))
    optimizer.step()


def outcome(run):
    """The results of each engine, or that it refused."""
    found = []
    for name in ("reference", "cpu"):
        with on(name):
            try:
                found.append(run())
            except (TypeError, ValueError):
                found.append(None)
    return found


def test_a_gradient_interleaved_with_its_parameter():
    """Refused or right: columns of one buffer share a range of memory, but no element."""

    def run():
        base = draw(0, (10, 2))
        param = Parameter(base[:, 0])
        optimizer = optim.AdamW([param])
        param.grad = base[:, 1]
        optimizer.step()
        return [*results(optimizer), {"beside": base[:, 1]}]

    reference, cpu = outcome(run)
    if cpu is not None:
        assert_same(cpu, reference)


def test_parameters_that_are_pieces_of_one_buffer():
    def run(threads):
        torch.set_num_threads(threads)
        base = draw(0, (999, 3))
        params = [Parameter(base[:500, 0]), Parameter(base[500:, 0]), Parameter(base[:, 1]), Parameter(base[:, 2])]
        optimizer = optim.AdamW(params)
        for k in range(STEPS):
            for index, param in enumerate(params):
                param.grad = draw(10 * k + index, param.shape)
            optimizer.step()
        return [*results(optimizer), {"base": base}]

    with on("reference"):
        wanted = run(1)
    with engine.cpu.forced_batch_elements(64):
        for threads in (1, 2):
            assert_same(run(threads), wanted)


def shared(warm, n, threads, one_after_the_other=False):
    """Two parameters that are the same memory: of one optimizer, or each of its own, the first stepping first."""
    torch.set_num_threads(threads)
    values = draw(0, (n,))
    params = [Parameter(values), Parameter(draw(1, (n,)) if warm else values)]
    lists = [[p] for p in params] if one_after_the_other else [params]
    optimizers = [optim.AdamW(own, lr=0.1) for own in lists]
    for k in range(6):
        if warm and k == 2:
            params[1].data = params[0].data
        for index, param in enumerate(params):
            param.grad = draw(10 * k + index + 5, (n,))
        for optimizer in optimizers:
            optimizer.step()
    return list(itertools.chain(*map(results, optimizers)))


@pytest.mark.parametrize("warm", [False, True], ids=["from the start", "shared later"])
def test_parameters_of_the_same_memory_are_updated_in_their_order(warm, engine_name):
    with on(engine_name):
        assert_same(shared(warm, 50, 1), shared(warm, 50, 1, one_after_the_other=True))


@pytest.mark.slow
@pytest.mark.parametrize("warm", [False, True], ids=["from the start", "shared later"])
def test_parameters_of_the_same_memory_do_not_race(warm):
    """Each a batch of its own, so that two threads would update both at once."""
    n = 1 << 20
    wanted = shared(warm, n, 1)
    with engine.cpu.forced_batch_elements(n):
        for _ in range(3):
            assert_same(shared(warm, n, 2), wanted)


# Kinds of gradients, in any succession


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


def lazily_negative(values):
    """`values` as the imaginary part of a conjugate."""
    view = torch.complex(torch.zeros_like(values), -values).conj().imag
    assert view.is_neg()
    return view


def conjugate(values):
    view = values.conj().resolve_conj().conj()
    assert view.is_conj()
    return view


def with_history(values):
    leaf = values.clone().requires_grad_()
    return leaf * 1


REAL_KINDS = {
    "plain": lambda v: v.clone(),
    "strided": lambda v: torch.stack([v, v], -1)[..., 0],
    "negative": lazily_negative,
    "subclass": lambda v: v.clone().as_subclass(Plain),
    "parameter": lambda v: Parameter(v.clone()),
    "with history": with_history,
    "float64": lambda v: v.double(),
    "float16": lambda v: v.half(),
    "expanded": lambda v: v.reshape(-1)[0].expand(v.shape),
    "zero tensor": lambda v: torch._efficientzerotensor(v.shape),
}
COMPLEX_KINDS = {
    "plain": lambda v: v.clone(),
    "conjugate": conjugate,
    "strided": lambda v: torch.stack([v, v], -1)[..., 0],
    "strided conjugate": lambda v: conjugate(torch.stack([v, v], -1))[..., 0],
    "complex128": lambda v: v.to(torch.complex128),
    "complex128 conjugate": lambda v: conjugate(v.to(torch.complex128)),
    "negative": lambda v: torch._neg_view(-v),
    "zero tensor": lambda v: torch._efficientzerotensor(v.shape, dtype=v.dtype),
}


@pytest.mark.parametrize("shape", [(), (1,), (2,), (4, 6)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "after"),
    [(torch.float32, kind) for kind in REAL_KINDS] + [(torch.complex64, kind) for kind in COMPLEX_KINDS],
    ids=str,
)
def test_a_gradient_of_one_kind_after_one_of_any_other(dtype, after, shape):
    kinds = COMPLEX_KINDS if dtype.is_complex else REAL_KINDS
    start, *values = (draw(k, shape, dtype) for k in range(5))
    wrong = []
    for before, name in itertools.product(kinds, ("cpu", "reference")):
        order = (before, after, after, before)
        gradients = [kinds[kind](v) for kind, v in zip(order, values, strict=True)]
        plain = [
            torch.zeros(shape, dtype=dtype) if g._is_zerotensor() else g.as_subclass(torch.Tensor) for g in gradients
        ]
        param = Parameter(start.clone())
        optimizer = optim.AdamW([param])
        with on(name):
            for gradient in gradients:
                param.grad_dtype = None
                param.grad = gradient
                optimizer.step()
        ours, wanted = results(optimizer), as_contiguous(start, plain)
        if not all(same(ours[0][key], wanted[0][key]) for key in wanted[0]):
            wrong.append((name, before))
    assert not wrong


def test_a_dense_gradient_that_is_lazily_negated():
    """The imaginary part of a conjugate has no stride of 1; a window on it may have.

    One that comes only after plain ones is not noticed: docs/design.md says why.
    """

    def window(seed):
        return draw(seed, (50,), torch.complex64).conj().imag.as_strided((4, 6), (6, 1), 0)

    gradients = [window(100 + k) for k in range(3)]
    assert gradients[-1].is_neg()
    assert gradients[-1].is_contiguous()
    check(draw(9, (4, 6)), gradients)


def test_conjugate_gradients_as_backward_makes_them():
    """Not made by hand: autograd returns lazy conjugates for products of complex numbers."""

    def run(resolve):
        param = Parameter(draw(0, (33,), torch.complex64))
        optimizer = optim.AdamW([param])
        lazy = []
        for k in range(5):
            factor = draw(k, (33,), torch.complex64)
            loss = (param.conj() * factor).real.sum() if k % 2 else torch.view_as_real(param).square().sum()
            param.grad = None
            loss.backward()
            lazy.append(param.grad.is_conj())
            if resolve:
                param.grad = param.grad.resolve_conj().clone()
            optimizer.step()
        return results(optimizer), lazy

    with on("reference"):
        wanted, _ = run(resolve=True)
    found, lazy = run(resolve=False)
    assert lazy == [False, True, False, True, False]
    assert_same(found, wanted)


@pytest.mark.parametrize("warm", [0, 2, 12])
def test_meta_parameters_are_refused(warm, engine_name):
    with on(engine_name):
        world = World().run(warm)
        world.set_gradients()
        param = world.params[-2]
        meta = Parameter(torch.empty(param.shape, device="meta"))
        meta.grad = torch.empty(param.shape, device="meta")
        torch.utils.swap_tensors(param, meta)
        before = snapshot(world.optimizer)
        with pytest.raises(ValueError, match="meta"):
            world.optimizer.step()
        assert snapshot(world.optimizer) == before


def test_parameters_not_yet_made_do_no_harm(engine_name):
    layer = torch.nn.LazyLinear(3)
    other = Parameter(draw(0, (3,)))
    optimizer = optim.AdamW([*layer.parameters(), other])
    other.grad = draw(1, (3,))
    with on(engine_name):
        optimizer.step()
        layer(torch.ones(2, 5)).sum().backward()
        optimizer.step()
    assert [int(entry["step"]) for entry in optimizer.state.values()] == [2, 1, 1]


# Lazy views of parameters and state, which no address can stand for


@pytest.mark.parametrize(
    ("dtype", "lazy", "warm"),
    [(torch.complex64, torch.conj, warm) for warm in (0, 2, 12)] + [(torch.float32, torch._neg_view, 0)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_lazy_parameters_are_refused(dtype, lazy, warm, engine_name):
    """A real one made by hand later, by torch's private _neg_view, is not noticed: docs/design.md says why."""
    with on(engine_name):
        world = World(dtype).run(warm)
        world.set_gradients()
        world.params[-2].data = lazy(world.params[-2].data)
        before = snapshot(world.optimizer)
        with pytest.raises(ValueError, match="lazily conjugated or negated"):
            world.optimizer.step()
        assert snapshot(world.optimizer) == before


@pytest.mark.parametrize("warm", [1, 12])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize(
    ("dtype", "lazy"), [(torch.complex64, torch.conj), (torch.float32, torch._neg_view)], ids=["conj", "neg"]
)
def test_lazy_state_is_refused_or_read_right(dtype, lazy, key, warm):
    def run():
        world = World(dtype).run(warm)
        entry = world.optimizer.state[world.params[0]]
        entry[key] = lazy(entry[key])
        return results(world.run(2).optimizer)

    reference, cpu = outcome(run)
    if cpu is not None:
        assert reference is not None
        assert_same(cpu, reference)


# Memory that is not there. In children: on failure they crash.


class Wrapper(torch.Tensor):
    """A tensor that has no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Wrapper(args[0].inner)
        raise NotImplementedError(func)


@pytest.mark.parametrize("warm", [0, 2, 12])
@pytest.mark.parametrize("what", ["gradient", "parameter", "exp_avg"])
def test_tensors_without_memory_are_refused(what, warm):
    """Wrapper subclasses, as DTensor is one."""

    def act():
        world = World().run(warm)
        world.optimizer.init_state()
        world.set_gradients()
        param = world.params[-2]
        if what == "gradient":
            param.grad = Wrapper(param.grad)
        elif what == "parameter":
            wrapped = Parameter(Wrapper(param.detach()))
            wrapped.grad = Wrapper(param.grad)
            torch.utils.swap_tensors(param, wrapped)
        else:
            world.optimizer.state[param][what] = Wrapper(torch.zeros(param.shape))
        before = snapshot(world.optimizer)
        with pytest.raises((TypeError, ValueError), match="memory"):
            world.optimizer.step()
        assert snapshot(world.optimizer) == before

    in_child(act)


@pytest.mark.parametrize("warm", [0, 2, 12])
@pytest.mark.parametrize("what", ["parameter", "gradient", "exp_avg", "max_exp_avg_sq", "step"])
def test_freed_memory_is_refused(what, warm):
    """FSDP and activation offloading free storages and keep the tensors."""

    def act():
        torch.set_num_threads(1)
        world = World(shapes=[(500,)] * 4, amsgrad=True).run(warm)
        world.optimizer.init_state()
        world.set_gradients()
        param = world.params[-1]
        kept = [(p, p.detach().clone()) for p in world.params[:-1]]
        entry = world.optimizer.state[param]
        {"parameter": param, "gradient": param.grad, **entry}[what].untyped_storage().resize_(0)
        del entry
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            world.optimizer.step()
            raise SystemExit("the step went through")
        for p, before in kept:
            assert torch.equal(p, before)

    in_child(act)


@pytest.mark.parametrize("warm", [0, 2, 12])
@pytest.mark.parametrize("what", ["parameter", "exp_avg"])
def test_zero_tensors_have_no_memory_to_write(what, warm):
    def act():
        torch.set_num_threads(1)
        world = World(shapes=[(500,)] * 4).run(warm)
        world.optimizer.init_state()
        world.set_gradients()
        param = world.params[-1]
        if what == "parameter":
            param.data = torch._efficientzerotensor(500)
        else:
            world.optimizer.state[param][what] = torch._efficientzerotensor(500)
        before = [p.detach().clone() for p in world.params[:-1]]
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            world.optimizer.step()
            raise SystemExit("the step went through")
        for p, old in zip(world.params[:-1], before, strict=True):
            assert torch.equal(p, old)

    in_child(act)
