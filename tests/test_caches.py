"""Guards that the plan never acts on what is no longer so.

The plan keeps addresses from step to step, and after some quiet steps it does not even read the state again, as
long as nobody else can reach it. Here everything that a user can change is changed, at a moment when the plan is
new, warm, or has stopped reading (sealed). A twin on the reference engine, which keeps nothing, has the same done
to it, and must end with the same bits.
"""

import contextlib
import copy
import gc
import itertools
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import SEALED, World, assert_same, in_child, is_sealed, on, peek, results
from lucid import engine

MOMENTS = [1, 3, SEALED, SEALED + 20]


def both(change, warm, before=None, after=3, effect=True, **options):
    """Run on each engine: `before`, `warm` steps, `change`, more steps. Compare after each of those."""

    def run(name, change):
        with on(name):
            world = World(**options)
            held = before(world) if before else None
            world.run(warm)
            if name == "cpu" and before is None and warm >= SEALED:
                assert is_sealed(world.optimizer)
            with contextlib.ExitStack() as stack:
                kept = change(world) if before is None else change(world, held)
                if isinstance(kept, contextlib.AbstractContextManager):
                    stack.enter_context(kept)
                found = [results(world.run(1).optimizer) for _ in range(after)]
            del kept, held
            return found

    wanted = run("reference", change)
    found = run("cpu", change)
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert_same(ours, theirs, f"step {step + 1} after the change")
    if effect:  # else the test could not fail
        unchanged = run("reference", (lambda world: None) if before is None else (lambda world, held: None))
        with pytest.raises(AssertionError):
            assert_same(wanted[-1], unchanged[-1])


AT_ANY_MOMENT = pytest.mark.parametrize("warm", MOMENTS)


# Parameters


def entry(world, index=0):
    return world.optimizer.state[world.params[index]]


def other_memory(world):
    world.params[0].data = torch.full((3, 5), 0.5)


def same_numbers_elsewhere(world):
    keep = world.params[0].data
    world.params[0].data = keep.clone()
    keep.fill_(torch.nan)
    world.kept = keep


def other_strides(world):
    world.params[0].data = torch.ones(5, 3).t()


def same_memory_other_strides(world):
    param = world.params[2]
    param.data = param.data.as_strided((4, 2, 3), (1, 4, 8))


def other_shape(world):
    """With its state, as nothing else fits."""
    param = world.params[0]
    param.data = param.data.reshape(5, 3)
    for key, slot in entry(world).items():
        if slot.dim():
            entry(world)[key] = slot.reshape(5, 3)
    world.params[0].grad = None


def set_in_place(world):
    with torch.no_grad():
        world.params[0].set_(torch.full((3, 5), 0.25))


def set_to_a_storage(world):
    with torch.no_grad():
        world.params[0].set_(torch.arange(30.0).untyped_storage(), 7, (3, 5), (5, 1))


def wider_storage(world):
    storage = world.params[0].untyped_storage()
    storage.resize_(1 << 20)
    entry(world)["exp_avg"].fill_(1.0)


def swapped(world):
    torch.utils.swap_tensors(world.params[0], Parameter(torch.full((3, 5), 2.0)))


def swapped_with_each_other(world):
    world.params[0].data = torch.ones(7)
    world.params[0].grad = None
    del world.optimizer.state[world.params[0]]
    torch.utils.swap_tensors(world.params[0], world.params[1])


def module_to_double(world):
    module = torch.nn.ParameterList(world.params)
    for param in world.params:
        param.grad = None
    module.double()
    world.dtype = torch.float64
    for index in range(len(world.params)):
        for key in ("exp_avg", "exp_avg_sq"):
            entry(world, index)[key] = entry(world, index)[key].double()


def shared_memory(world):
    for param in world.params:
        param.share_memory_()
    world.params[0].data.mul_(2)


PARAMETER_CHANGES = [
    other_memory,
    same_numbers_elsewhere,
    other_strides,
    same_memory_other_strides,
    other_shape,
    set_in_place,
    set_to_a_storage,
    wider_storage,
    swapped,
    swapped_with_each_other,
    module_to_double,
    shared_memory,
]


@AT_ANY_MOMENT
@pytest.mark.parametrize("change", PARAMETER_CHANGES, ids=lambda f: f.__name__)
def test_changes_of_parameters(change, warm):
    both(change, warm, effect=change is not same_numbers_elsewhere)


@AT_ANY_MOMENT
def test_the_old_memory_of_a_parameter_is_left_alone(warm, engine_name):
    with on(engine_name):
        world = World().run(warm)
        old = world.params[0].data
        before = old.clone()
        world.params[0].data = old.clone()
        world.run(2)
        assert torch.equal(old, before)


@AT_ANY_MOMENT
def test_a_module_moved_to_another_type_without_its_state_is_refused(warm, engine_name):
    """As torch's documentation asks for: build the optimizer after .to()."""
    with on(engine_name):
        world = World().run(warm)
        torch.nn.ParameterList(world.params).double()
        world.dtype = torch.float64
        before = [p.detach().clone() for p in world.params]
        with pytest.raises(ValueError, match="float32"):
            world.step()
        assert all(torch.equal(p, b) for p, b in zip(world.params, before, strict=True))


# Groups


def added(world):
    world.optimizer.add_param_group({"params": [Parameter(torch.ones(3))], "lr": 0.5})
    world.params.append(world.optimizer.param_groups[-1]["params"][0])


def replaced_list(world):
    world.optimizer.param_groups[0]["params"] = [Parameter(p.detach().clone()) for p in world.params[:2]]
    world.params[:2] = world.optimizer.param_groups[0]["params"]


def replaced_by_equals(world):
    """Accelerate's FSDP2: other objects with the same numbers, the state moved to them."""
    group = world.optimizer.param_groups[0]
    new = [Parameter(p.detach().clone()) for p in group["params"]]
    for old, fresh in zip(group["params"], new, strict=True):
        world.optimizer.state[fresh] = world.optimizer.state.pop(old)
    group["params"] = new
    world.params[:2] = new
    with torch.no_grad():
        new[0].mul_(2)


def replaced_in_the_list(world):
    world.params[1] = Parameter(torch.ones(9))
    world.optimizer.param_groups[0]["params"][1] = world.params[1]


def reordered_groups(world):
    world.optimizer.param_groups.reverse()
    world.optimizer.param_groups[0]["lr"] = 0.2


def reordered_params(world):
    world.optimizer.param_groups[0]["params"].reverse()
    world.optimizer.param_groups[0]["params"][0].data.mul_(2)


def moved_between_groups(world):
    groups = world.optimizer.param_groups
    groups[1]["params"].append(groups[0]["params"].pop())


def removed_parameter(world):
    gone = world.optimizer.param_groups[0]["params"].pop()
    del world.optimizer.state[gone]
    world.params = [p for p in world.params if p is not gone]


def removed_parameter_with_state_left(world):
    gone = world.optimizer.param_groups[0]["params"].pop()
    world.params = [p for p in world.params if p is not gone]


def removed_group(world):
    for gone in world.optimizer.param_groups.pop()["params"]:
        world.params = [p for p in world.params if p is not gone]


def replaced_groups(world):
    world.optimizer.param_groups = [dict(group, lr=0.4) for group in world.optimizer.param_groups]


def tuple_of_params(world):
    world.optimizer.param_groups[0]["params"] = tuple(world.params[:2])
    world.optimizer.param_groups[0]["lr"] = 0.3


def amsgrad_on(world):
    world.optimizer.param_groups[0]["amsgrad"] = True


def maximize_on(world):
    world.optimizer.param_groups[1]["maximize"] = True


def every_number(world):
    world.optimizer.param_groups[0].update(lr=0.5, betas=(0.1, 0.2), eps=0.3, weight_decay=0.4)


def loaded(world):
    other = World().run(5)
    world.optimizer.load_state_dict(other.optimizer.state_dict())


def loaded_own(world):
    saved = copy.deepcopy(world.optimizer.state_dict())
    world.run(2)
    world.optimizer.load_state_dict(saved)


def loaded_by_torchs_base(world):
    torch.optim.Optimizer.load_state_dict(world.optimizer, World().run(5).optimizer.state_dict())


def copied_deeply(world):
    twin = copy.deepcopy(world)
    world.params, world.optimizer = twin.params, twin.optimizer
    world.optimizer.param_groups[0]["lr"] = 0.7


def pickled(world):
    world.params, world.optimizer = pickle.loads(pickle.dumps((world.params, world.optimizer)))
    world.optimizer.param_groups[0]["lr"] = 0.7


GROUP_CHANGES = [
    added,
    replaced_list,
    replaced_by_equals,
    replaced_in_the_list,
    reordered_groups,
    reordered_params,
    moved_between_groups,
    removed_parameter,
    removed_parameter_with_state_left,
    removed_group,
    replaced_groups,
    tuple_of_params,
    amsgrad_on,
    maximize_on,
    every_number,
    loaded,
    loaded_own,
    loaded_by_torchs_base,
    copied_deeply,
    pickled,
]


@AT_ANY_MOMENT
@pytest.mark.parametrize("change", GROUP_CHANGES, ids=lambda f: f.__name__)
def test_changes_of_groups(change, warm):
    both(change, warm)


@AT_ANY_MOMENT
def test_amsgrad_off_and_on_again(warm):
    def off_and_on(world):
        world.optimizer.param_groups[0]["amsgrad"] = False
        world.run(SEALED)
        world.optimizer.param_groups[0]["amsgrad"] = True

    both(off_and_on, warm, amsgrad=True)


# State


def replaced_tensor(world):
    entry(world)["exp_avg"] = torch.full((3, 5), 0.25)


def replaced_by_other_strides(world):
    entry(world)["exp_avg_sq"] = torch.full((5, 3), 0.25).t()


def replaced_step(world):
    entry(world)["step"] = torch.tensor(40.0)


def replaced_step_by_a_number(world):
    entry(world)["step"] = 40


def data_of_tensor(world):
    entry(world)["exp_avg"].data = torch.full((3, 5), 0.25)


def data_of_step(world):
    entry(world)["step"].data = torch.tensor(40.0)


def set_tensor(world):
    entry(world)["exp_avg"].set_(torch.full((3, 5), 0.25))


def resized_storage(world):
    slot = entry(world)["exp_avg"]
    slot.untyped_storage().resize_(1 << 20)
    slot.mul_(2)


def written(world):
    entry(world)["exp_avg"].fill_(0.25)


def written_step(world):
    entry(world)["step"].fill_(40.0)


def replaced_entry(world):
    world.optimizer.state[world.params[0]] = {key: value.clone() + 1 for key, value in entry(world).items()}


def copied_entry(world):
    """The same tensors in another dict."""
    world.optimizer.state[world.params[0]] = dict(entry(world))
    entry(world)["step"].add_(10)


def reordered_entry(world):
    own = entry(world)
    items = list(own.items())
    own.clear()
    own.update(reversed(items))
    own["exp_avg"].mul_(2)


def own_keys(world):
    entry(world)["user"] = torch.ones(3)
    entry(world)["exp_avg"].mul_(2)
    world.optimizer.state["user"] = {"anything": 1}


def exchanged_entries(world):
    state, (one, two) = world.optimizer.state, (world.params[2], world.params[2])
    state[one], state[two] = state[two], state[one]
    own = state[one]
    own["exp_avg"], own["exp_avg_sq"] = own["exp_avg_sq"], own["exp_avg"].abs()


def cleared_entry(world):
    entry(world).clear()


def removed_entry(world):
    del world.optimizer.state[world.params[1]]


def cleared_state(world):
    world.optimizer.state.clear()


def other_state(world):
    world.optimizer.state = {}


def copied_state(world):
    world.optimizer.state = copy.deepcopy(
        {p: {k: v + 1 for k, v in e.items()} for p, e in world.optimizer.state.items()},
        {id(p): p for p in world.params},
    )


def state_from_another(world):
    world.other = World().run(4)
    state = world.optimizer.state
    for ours, theirs in zip(world.params, world.other.params, strict=True):
        state[ours] = world.other.optimizer.state[theirs]


def detached_tensors(world):
    """New objects on the same memory; the old ones are freed."""
    for own in world.optimizer.state.values():
        for key in own:
            own[key] = own[key].detach()
        own["exp_avg"].mul_(2)


STATE_CHANGES = [
    replaced_tensor,
    replaced_by_other_strides,
    replaced_step,
    replaced_step_by_a_number,
    data_of_tensor,
    data_of_step,
    set_tensor,
    resized_storage,
    written,
    written_step,
    replaced_entry,
    copied_entry,
    reordered_entry,
    own_keys,
    exchanged_entries,
    cleared_entry,
    removed_entry,
    cleared_state,
    other_state,
    copied_state,
    state_from_another,
    detached_tensors,
]


@AT_ANY_MOMENT
@pytest.mark.parametrize("change", STATE_CHANGES, ids=lambda f: f.__name__)
def test_changes_of_state(change, warm):
    both(change, warm)


@pytest.mark.parametrize("change", [cleared_state, replaced_tensor, removed_entry, detached_tensors, loaded])
@pytest.mark.parametrize("rest", [1, SEALED])
@pytest.mark.parametrize("warm", [1, SEALED])
def test_changes_of_state_while_a_parameter_has_no_gradient(change, rest, warm):
    """The parameter sits out while its state changes, and comes back steps later. In a child: it may crash."""

    def changed(world):
        skipped = world.params[:2]

        def without_gradients():
            World.set_gradients(world)
            for param in skipped:
                param.grad = None

        world.set_gradients = without_gradients
        world.run(1)
        change(world)
        gc.collect()
        world.filler = [torch.full((15,), torch.nan) for _ in range(100)]
        world.run(rest)
        del world.set_gradients

    def act():
        torch.set_num_threads(1)
        both(changed, warm)

    in_child(act)


# State that someone holds and changes many steps later


class Weakly:
    """A weak reference, called to reach what it refers to."""

    def __init__(self, tensor):
        self.reference = weakref.ref(tensor)

    def reach(self):
        return self.reference()


def first_entry(world):
    world.optimizer.init_state()
    return entry(world)


HOLDERS = {
    "the tensor": lambda w: (held := first_entry(w)["exp_avg"], lambda: held)[1],
    "the entry": lambda w: (held := first_entry(w), lambda: held["exp_avg"])[1],
    "the state": lambda w: (first_entry(w), held := w.optimizer.state, lambda: held[w.params[0]]["exp_avg"])[2],
    "an iterator of the state": lambda w: (
        first_entry(w), held := iter(w.optimizer.state.values()), lambda: next(held)["exp_avg"])[2],
    "a view of the entry": lambda w: (held := first_entry(w).values(), lambda: list(held)[1])[1],
    "a list": lambda w: (held := [*first_entry(w).values()], lambda: held[1])[1],
    "a weak reference": lambda w: Weakly(first_entry(w)["exp_avg"]).reach,
    "a state dict": lambda w: (
        first_entry(w), held := w.optimizer.state_dict(), lambda: held["state"][0]["exp_avg"])[2],
    "what pickling sees": lambda w: (
        first_entry(w), held := w.optimizer.__getstate__(), lambda: held["state"][w.params[0]]["exp_avg"])[2],
    "a shallow copy": lambda w: (
        first_entry(w), held := copy.copy(w.optimizer), lambda: held.state[w.params[0]]["exp_avg"])[2],
    "a bound method of the tensor": lambda w: (
        held := first_entry(w)["exp_avg"].fill_, lambda: held.__self__)[1],
    "a script list": lambda w: (held := torch._C.ScriptList([first_entry(w)["exp_avg"]]), lambda: held[0])[1],
}  # fmt: skip

REACHES = {
    "data": lambda t: setattr(t, "data", torch.full((3, 5), 0.25)),
    "set_": lambda t: t.set_(torch.full((3, 5), 0.25)),
    "swapped": lambda t: torch.utils.swap_tensors(t, torch.full((3, 5), 0.25)),
    "filled": lambda t: t.fill_(0.25),
    "storage": lambda t: (t.untyped_storage().resize_(1 << 20), t.mul_(2)),
}


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("warm", [3, SEALED + 5])
def test_state_that_someone_holds(holder, reach, warm):
    if reach == "swapped" and holder in ("a weak reference", "a script list", "a state dict", "a list"):
        both(lambda world, held: None, warm, before=lambda world: HOLDERS[holder](world), effect=False)
        return  # torch swaps no tensor that others refer to

    def change(world, held):
        tensor = held()
        assert tensor is not None
        REACHES[reach](tensor)

    both(change, warm, before=HOLDERS[holder])


SHARERS = {
    "a view": lambda t: t.view(-1),
    "a detached tensor": lambda t: t.detach(),
    "a slice": lambda t: t[1:],
    "the storage": lambda t: t.untyped_storage(),
    "a typed storage": lambda t: t.untyped_storage(),
    "an array": lambda t: t.numpy(),
    "a capsule": lambda t: t.__dlpack__(),
    "an array of a view": lambda t: np.asarray(t.detach()),
    "a parameter on it": lambda t: Parameter(t),
}


@pytest.mark.parametrize("sharer", SHARERS)
@pytest.mark.parametrize("warm", [3, SEALED + 5])
def test_state_whose_memory_someone_shares(sharer, warm):
    """A storage that is resized moves, under every tensor on it."""

    def hold(world):
        return SHARERS[sharer](first_entry(world)["exp_avg"])

    def change(world, held):
        if isinstance(held, torch.Tensor):
            held = held.untyped_storage()
        elif isinstance(held, np.ndarray):
            held[...] = 0.25
            return
        elif not isinstance(held, torch.UntypedStorage):
            held = torch.from_dlpack(held)
            held.fill_(0.25)
            return
        old = held.data_ptr()
        held.resize_(1 << 22)
        held.fill_(0)
        assert held.data_ptr() != old

    both(change, warm, before=hold)


def test_holding_nothing_seals_the_plan():
    world = World().run(SEALED)
    assert is_sealed(world.optimizer)
    assert world.optimizer.state
    assert not is_sealed(world.optimizer)
    world.run(SEALED)
    assert is_sealed(world.optimizer)


class Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kept):
        ctx.save_for_backward(kept)
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.parametrize("holder", ["python", "autograd", "a script list"])
def test_a_held_tensor_keeps_the_plan_reading(holder):
    world = World()
    slot = first_entry(world)["exp_avg"]
    if holder == "python":
        held = slot
    elif holder == "autograd":
        held = Saved.apply(torch.ones(1, requires_grad=True), slot)
    else:
        held = torch._C.ScriptList([slot])
    del slot
    world.run(5 * SEALED)
    assert not is_sealed(world.optimizer)
    del held


# Gradients


def no_gradients_once(world):
    for param in world.params[:2]:
        param.grad = None
    world.optimizer.step()


def zeroed(world):
    world.optimizer.zero_grad(set_to_none=False)
    world.optimizer.step()


def zeroed_to_none(world):
    world.optimizer.zero_grad()
    world.optimizer.step()
    world.set_gradients()
    world.params[0].grad.mul_(5)
    world.optimizer.step()


def accumulated(world):
    for param in world.params:
        param.grad.add_(1)
    world.optimizer.step()


def gradient_data(world):
    world.params[0].grad.data = torch.ones(3, 5)
    world.optimizer.step()


def gradient_of_other_strides(world):
    world.params[0].grad = torch.arange(15.0).view(5, 3).t()
    world.optimizer.step()
    world.params[0].grad = torch.arange(15.0).view(3, 5)
    world.optimizer.step()


def gradient_of_other_type(world):
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float32):
        world.params[0].grad_dtype = None
        world.params[0].grad = torch.arange(15.0).view(3, 5).to(dtype)
        world.optimizer.step()


def gradient_expanded(world):
    world.params[0].grad = torch.ones(()).expand(3, 5)
    world.optimizer.step()


def gradient_in_one_buffer(world):
    buffer = torch.arange(200.0)
    at = 0
    for param in world.params:
        param.grad = buffer[at : at + param.numel()].view(param.shape)
        at += param.numel() + 1
    world.optimizer.step()
    buffer.mul_(-1)
    world.optimizer.step()


def the_same_gradient_for_two(world):
    world.params.append(Parameter(torch.ones(3, 5)))
    world.optimizer.add_param_group({"params": world.params[-1:]})
    world.params[-1].grad = world.params[0].grad
    world.optimizer.step()


GRADIENT_CHANGES = [
    no_gradients_once,
    zeroed,
    zeroed_to_none,
    accumulated,
    gradient_data,
    gradient_of_other_strides,
    gradient_of_other_type,
    gradient_expanded,
    gradient_in_one_buffer,
    the_same_gradient_for_two,
]


@AT_ANY_MOMENT
@pytest.mark.parametrize("change", GRADIENT_CHANGES, ids=lambda f: f.__name__)
def test_changes_of_gradients(change, warm):
    both(change, warm)


@AT_ANY_MOMENT
def test_gradients_in_place_step_after_step(warm):
    """Buffers that stay where they are, as DDP keeps them, and are replaced once."""

    def in_place(world):
        kept = [p.grad for p in world.params]

        def write():
            for index, (param, grad) in enumerate(zip(world.params, kept, strict=True)):
                param.grad = grad
                grad.copy_(world.draw(1000 + 100 * world.done + index, param.shape) * 3)

        world.set_gradients = write

    both(in_place, warm, after=SEALED + 3)


# Settings


@AT_ANY_MOMENT
def test_thread_counts_batches_and_levels_change_nothing(warm):
    world = World(shapes=[(5000,), (70_001,), (3,)])
    with on("reference"):
        wanted = results(World(shapes=[(5000,), (70_001,), (3,)]).run(warm + 6).optimizer)
    world.run(warm)
    for step in range(6):
        torch.set_num_threads(1 + step % 2)
        level = engine.cpu.simd_levels()[step % len(engine.cpu.simd_levels())]
        with engine.cpu.forced_simd_level(level), engine.cpu.forced_batch_elements(1000 * (step + 1)):
            world.run(1)
    assert_same(results(world.optimizer), wanted)


@pytest.mark.parametrize("mode", ["default device", "default dtype", "inference", "no grad", "enable grad"])
@pytest.mark.parametrize(
    ("engine_name", "warm"), [("cuda", 3), *itertools.product(["cpu", "reference"], [0, 3, SEALED])]
)
def test_modes_of_torch_change_nothing(mode, warm, engine_name):
    def entered():
        if mode == "default device":
            return torch.device("meta")
        return {"inference": torch.inference_mode, "no grad": torch.no_grad, "enable grad": torch.enable_grad}[mode]()

    with on(engine_name):
        wanted = results(World().run(warm + SEALED).optimizer)
        world = World().run(warm)
        before = torch.get_default_dtype()
        try:
            if mode == "default dtype":
                torch.set_default_dtype(torch.float64)
            for _ in range(SEALED):
                world.set_gradients()
                with contextlib.nullcontext() if mode == "default dtype" else entered():
                    world.optimizer.step()
                world.done += 1
        finally:
            torch.set_default_dtype(before)
    assert_same(results(world.optimizer), wanted)


# What the plan must not keep


def weak(tensor):
    """Whether a tensor's memory lives on, asked of its storage: the tensor may not be weakly referred to."""
    return weakref.ref(tensor)


@AT_ANY_MOMENT
@pytest.mark.parametrize("what", ["gradient", "state", "parameter", "everything"])
def test_what_is_let_go_is_freed(what, warm):
    world = World().run(warm)
    gc.collect()
    gc.disable()
    try:
        if what == "gradient":
            watched = [weak(param.grad) for param in world.params]
            world.optimizer.zero_grad()
        elif what == "state":
            watched = [weak(slot) for own in world.optimizer.state.values() for slot in own.values()]
            world.optimizer.state.clear()
        elif what == "parameter":
            gone = world.optimizer.param_groups[0]["params"].pop()
            watched = [weak(gone)]
            world.optimizer.state.pop(gone)
            world.params = [p for p in world.params if p is not gone]
            del gone
        else:
            watched = [weak(param) for param in world.params]
            world.params, world.optimizer = [], None
        assert all(reference() is None for reference in watched)
    finally:
        gc.enable()


@pytest.mark.parametrize("engines", ["cpu", "reference"])
def test_gradients_are_freed_after_a_step_that_fails(engines):
    with on(engines):
        world = World().run(2)
        world.set_gradients()
        world.params[-1].grad = world.params[-1].grad.to_sparse()
        with contextlib.suppress(TypeError):
            world.optimizer.step()
        watched = [weak(param.grad) for param in world.params]
        world.optimizer.zero_grad()
        gc.collect()
        assert all(reference() is None for reference in watched)


@pytest.mark.parametrize("warm", [1, SEALED])
def test_the_plan_keeps_no_weak_references(warm):
    """torch.utils.swap_tensors refuses tensors that have any."""
    world = World().run(warm)
    tensors = [*world.params, *(slot for own in peek(world.optimizer).values() for slot in own.values())]
    assert [weakref.getweakrefcount(tensor) for tensor in tensors] == [0] * len(tensors)


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_rows_that_are_looked_at_anew_leave_nothing_behind():
    """A gradient of a subclass, or of another layout each time, has its row bound at every step."""

    def act():
        param = Parameter(torch.ones((1,) * 60))
        optimizer = optim.AdamW([param])
        param.grad = torch.ones((1,) * 60).as_subclass(Plain)
        for _ in range(200):
            optimizer.step()
        before = resident_bytes()
        for _ in range(6000):
            optimizer.step()
        assert resident_bytes() - before < 5e6, f"{resident_bytes() - before} bytes more"

    in_child(act)


# Twice the same


def test_one_parameter_listed_twice(engine_name):
    """Torch warns of it when a group is made; a list replaced later is nobody's to check but the step's."""
    with on(engine_name):
        world = World().run(2)
        world.optimizer.param_groups[0]["params"] = [world.params[0], world.params[1], world.params[0]]
        kept = [p.detach().clone() for p in world.params]
        with pytest.raises(ValueError, match="more than once"):
            world.step()
        assert all(torch.equal(p, b) for p, b in zip(world.params, kept, strict=True))
