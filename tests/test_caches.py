"""Guards that the plan never acts on state that is no longer so, and keeps nothing longer than it should.

The plan keeps addresses from step to step, and after some quiet steps it does not even read the state again, as long
as nobody else can reach it. Here everything that a user can change in the state is changed, or held and changed later,
at a moment when the plan is new, warm, or has stopped reading (sealed). A twin on the reference engine, which keeps
nothing, has the same done to it, and must end with the same bits. Parameters, groups and gradients are in
test_caches_inputs.py.
"""

import contextlib
import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import SEALED, World, in_child, is_sealed, on, peek
from changed import AT_ANY_MOMENT, both, entry, loaded

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


@pytest.mark.slow
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
