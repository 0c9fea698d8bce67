"""Guards that the plan never acts on parameters, groups, gradients or settings that are no longer so.

The plan keeps addresses from step to step. Everything that a user can change between two steps is changed, at a moment
when the plan is new, warm, or has stopped reading the state (sealed). A twin on the reference engine, which keeps
nothing, has the same done to it, and must end with the same bits.
"""

import contextlib
import copy
import itertools
import pickle

import pytest
import torch
from torch.nn import Parameter

from bits import SEALED, World, assert_same, on, results
from changed import AT_ANY_MOMENT, both, entry, loaded
from lucid import engine

# Parameters


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
