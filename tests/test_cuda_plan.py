"""Guards what the CUDA engine tells a device, and when: launches, tables, uploads, and how long they are kept.

`Device` (launchers.py) notes what it is asked to do: how many launches and how many words are uploaded in each step is
counted, and everything that may change between two steps is changed, each compared to the bit with an engine that keeps
no tables. What fails is in test_cuda_failures.py, several devices are in test_cuda_devices.py, and the arithmetic of
the tables is in test_cuda_tables.py.
"""

import collections
import copy
import ctypes
import gc
import weakref

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import World, assert_same, draw, on, results
from launchers import OPTIONS, Device, settled
from lucid.engine.cuda import device_tables, launch
from lucid.engine.numbers import SET, Scalar, ToldOfSet

# What a step launches and uploads


KINDS = (torch.float32, torch.bfloat16, torch.float64)


def params_of_kinds(count, size=3):
    return [Parameter(draw(k, (size,)).to(KINDS[k % len(KINDS)])) for k in range(count)]


def give_gradients(params, seed=0):
    for k, param in enumerate(params):
        param.grad = draw(1000 * (seed + 1) + k, param.shape).to(param.dtype)


def change_gradients(params, seed):
    for k, param in enumerate(params):
        param.grad.copy_(draw(1000 * (seed + 1) + k, param.shape))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("count", [3, 1000])
def test_a_step_is_one_launch_for_each_kind_however_many_rows(count, options, device, monkeypatch):
    """Of a device that does not run the host learns nothing to decide by: it is told that all gradients are 0."""
    monkeypatch.setattr(device, "runs", False)
    monkeypatch.setattr(device, "empty", lambda words: torch.zeros(words, dtype=torch.int64))
    params = params_of_kinds(count)
    give_gradients(params)
    optimizer = optim.AdamW(params, **options)
    with on("cuda"):
        for step in range(3):
            device.forget()
            optimizer.step()
            names = collections.Counter(name for name, _ in device.launched)
            decides = options not in ({}, OPTIONS["error"]) and step > 0
            assert names["update"] == 3
            assert names["squares"] == 3 * bool(options)
            assert names["decide"] == decides
            assert names["settle"] == bool(options)
            programs = collections.Counter()
            for name, each in device.launched:
                programs[name] += each
            assert programs["update"] == count


def words_of_step(rows):
    """What a step uploads where gradients are at new addresses: these, sets and streams."""
    return 3 * rows


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("groups", [1, 3])
def test_only_what_has_changed_is_uploaded(groups, options, device):
    params = params_of_kinds(6)
    give_gradients(params)
    optimizer = optim.AdamW([{"params": params[k::groups]} for k in range(groups)], **options)
    scalars = [SET] * (options == OPTIONS["error"]) + [SET * (1 + groups)]  # before, what the host lets measure
    with on("cuda"):
        optimizer.step()
        first = device.uploads[:]
        for step in range(12):  # until the plan does not even read the state any more
            device.forget()
            change_gradients(params, step)
            optimizer.step()
            powers = [357, 4096] if step == 0 and options not in ({}, OPTIONS["error"]) else []  # of both betas, once
            assert device.uploads == [*powers, *scalars]
            assert set(device.prepared) <= {"decide"}  # which are told of this step
        device.forget()
        kept = [param.grad for param in params]  # so that the new ones are elsewhere
        give_gradients(params, 99)
        optimizer.step()
        assert device.uploads == [words_of_step(6), *scalars]
        assert set(device.prepared) <= {"decide"}
        device.forget()
        optimizer.step()
        assert device.uploads == scalars
    assert len(first) == 3 + 2 * bool(options)  # rows, the step, scalars; what and how to measure
    assert len(kept) == 6


def test_scalars_are_uploaded_for_each_step_count(device):
    params = params_of_kinds(6)
    give_gradients(params)
    optimizer = optim.AdamW(params)
    twin = optim.AdamW(twins := [Parameter(p.detach().clone()) for p in params])
    late = list(range(6))
    with on("cuda"):
        for step in range(6):
            device.forget()
            for mine, its in zip(params, twins, strict=True):
                mine.grad = its.grad = None
            for k in late[: step + 1]:
                params[k].grad = twins[k].grad = draw(100 * step + k, (3,)).to(params[k].dtype)
            optimizer.step()
            assert device.uploads[-1] == SET * (2 + step)
            assert len(device.updates) == min(3, step + 1)
    for step in range(6):
        for k, its in enumerate(twins):
            its.grad = draw(100 * step + k, (3,)).to(its.dtype) if k in late[: step + 1] else None
        twin.step()
    assert_same(results(optimizer), results(twin))


def test_sixteen_bits_and_draws_upload_no_more(device):
    """Streams do not change from step to step, nor do the numbers of elements."""
    params = [Parameter(draw(k, (70, 64)).to((torch.float32, torch.bfloat16)[k % 2])) for k in range(4)]
    optimizer = optim.AdamW([{"params": params[:2], "state_format": "8bit"}, {"params": params[2:]}])
    optimizer.param_groups[1]["state_format"] = "bf16"
    give_gradients(params)
    with on("cuda"):
        for step in range(3):
            device.forget()
            optimizer.step()
            assert len(device.updates) == 4
            assert step == 0 or device.uploads == [3 * SET]


def test_nothing_to_update_launches_nothing(device):
    optimizer = optim.AdamW(params_of_kinds(3), max_grad_norm=1.0)
    with on("cuda"):
        optimizer.step()
        assert not device.launched
        give_gradients(optimizer.param_groups[0]["params"])
        optimizer.step()
        optimizer.zero_grad()
        device.forget()
        optimizer.step()
        assert optimizer.grad_norm == 0.0
    assert [entry["step"].item() for entry in optimizer.state.values()] == [1.0] * 3


# Whatever changes between two steps


class Changing(World):
    """Rows of three kinds; each change is made between two steps."""

    def __init__(self, **options):
        super().__init__(shapes=((3, 5), (70, 64), (4, 2, 3), (), (0, 4)), **options)
        self.misaligned = False

    def set_gradients(self):
        super().set_gradients()
        if self.misaligned:
            for param in self.params:
                values = torch.zeros(param.numel() + 1, dtype=param.grad.dtype)
                values[1:] = param.grad.reshape(-1)
                param.grad = values[1:].view(param.shape)
                assert not param.numel() or param.grad.data_ptr() % 16


def entry(world, index=0):
    return world.optimizer.state[world.params[index]]


def other_memory(world):
    world.params[0].data = world.params[0].data.clone()


def other_strides(world):
    world.params[0].data = torch.ones(5, 3).t()


def new_state(world):
    entry(world)["exp_avg"] = entry(world)["exp_avg"].clone().mul_(2)


def new_step_count(world):
    entry(world)["step"] = torch.tensor(7.0)


def exchanged(world):
    world.optimizer.state[world.params[0]] = copy.deepcopy(entry(world))


def loaded(world):
    world.optimizer.load_state_dict(copy.deepcopy(world.optimizer.state_dict()))


def loaded_torchs(world):
    world.optimizer.load_state_dict(copy.deepcopy(world.optimizer.torch_state_dict()))


def added(world):
    world.optimizer.add_param_group({"params": [Parameter(torch.ones(9))], "lr": 0.5})
    world.params.append(world.optimizer.param_groups[-1]["params"][0])


def taken_out(world):
    world.optimizer.param_groups[0]["params"].remove(world.params.pop(0))


def amsgrad(world):
    world.optimizer.param_groups[0]["amsgrad"] = True


def maximize(world):
    world.optimizer.param_groups[1]["maximize"] = True


def misaligned(world):
    world.misaligned = True


def misaligned_once(world):
    world.misaligned = True
    world.step()
    world.misaligned = False


def gradients_of_another_type(world):
    world.params[0].grad_dtype = None
    for _ in range(2):
        world.set_gradients()
        world.params[0].grad = world.params[0].grad.double()
        world.optimizer.step()
        world.done += 1


def gradients_of_other_strides(world):
    world.set_gradients()
    world.params[1].grad = world.params[1].grad.t().contiguous().t()
    world.optimizer.step()
    world.done += 1


def one_without_a_gradient(world):
    world.set_gradients()
    world.params[1].grad = None
    world.optimizer.step()
    world.done += 1


def one_alone(world):
    """And others with state of other step counts from then on."""
    for _ in range(2):
        world.set_gradients()
        for param in world.params[1:]:
            param.grad = None
        world.optimizer.step()
        world.done += 1


def one_without_any_more(world):
    world.params[2].requires_grad_(False)
    world.params[2].grad = None
    del world.params[2]


def shared_memory(world):
    """Rows on one memory are updated one after the other."""
    world.params[2].data = torch.zeros(24).view(4, 2, 3)
    world.params[0].data = world.params[2].data.view(-1)[:15].view(3, 5)


CHANGES = [
    other_memory,
    other_strides,
    new_state,
    new_step_count,
    exchanged,
    loaded,
    loaded_torchs,
    added,
    taken_out,
    amsgrad,
    maximize,
    misaligned,
    misaligned_once,
    gradients_of_another_type,
    gradients_of_other_strides,
    one_without_a_gradient,
    one_alone,
    one_without_any_more,
    shared_memory,
]


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "state_format": "8bit"}], ids=["fp32", "8bit, clipped"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_tables_are_right_after_a_change(change, options, device):
    def run(name):
        with on(name):
            world = Changing(**options).run(2)
            change(world)
            found = []
            for _ in range(2):
                device.forget()
                world.step()
                found.append(settled(world.optimizer))
        return found

    wanted, found = run("cpu"), run("cuda")
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert_same(ours, theirs, f"step {step + 1} after the change")
    assert device.uploads[-1] <= SET * 5
    if change is not one_alone:
        assert len(device.uploads) <= 2  # tables have been uploaded in the step before


def test_memory_that_was_let_go_is_not_written(device):
    """Neither that of parameters nor of state nor of gradients, whatever tables still stand on the device."""
    world = World(max_grad_norm=1.0)
    with on("cuda"):
        world.run(2)
        old = [world.params[0].data, entry(world)["exp_avg"], entry(world)["exp_avg_sq"], world.params[1].grad]
        before = [tensor.clone() for tensor in old]
        world.params[0].data = world.params[0].data.clone()
        for key in ("exp_avg", "exp_avg_sq"):
            entry(world)[key] = entry(world)[key].clone()
        world.run(2)
    for tensor, values in zip(old, before, strict=True):
        assert torch.equal(tensor, values)


# What is kept, and how long


def resident_of(optimizer):
    (found,) = optimizer._stepper.whole.plan._cuda._tables.values()
    return found


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_what_lies_on_a_device_goes_with_the_optimizer(options, device):
    with on("cuda"):
        world = World(**options)
        world.optimizer.observe()
        world.run(2)
        kept = [weakref.ref(x) for x in (resident_of(world.optimizer), world.optimizer._stepper.whole.plan._cuda)]
        kept += [weakref.ref(world.params[0]), weakref.ref(resident_of(world.optimizer)._table)]
        device.forget()
        del world
        gc.collect()
        assert [ref() for ref in kept] == [None] * 4


@pytest.mark.parametrize("change", [other_memory, added, amsgrad, new_state, misaligned], ids=lambda f: f.__name__)
def test_what_lies_on_a_device_goes_when_it_is_replaced(change, device):
    with on("cuda"):
        world = Changing(max_grad_norm=1.0).run(2)
        old = weakref.ref(resident_of(world.optimizer))
        table = weakref.ref(resident_of(world.optimizer)._table)
        change(world)
        world.run(1)
        gc.collect()
        assert old() is None
        assert table() is None


def test_gradients_go_after_a_step(device):
    with on("cuda"):
        world = World(max_grad_norm=1.0, nonfinite="skip").run(2)
        world.set_gradients()
        refs = [weakref.ref(param.grad) for param in world.params]
        world.optimizer.step()
        world.optimizer.zero_grad()
        assert [ref() for ref in refs] == [None] * len(refs)


def test_tables_of_powers_do_not_pile_up(device, monkeypatch):
    """Schedules that cycle momentum have other betas at each step."""
    device.runs = False
    monkeypatch.setattr(device, "empty", lambda words: torch.zeros(words, dtype=torch.int64))
    with on("cuda"):
        world = World(shapes=((2,), (2,)), max_grad_norm=1.0).run(1)
        for step in range(700):
            for number, group in enumerate(world.optimizer.param_groups):
                group["betas"] = (0.1 + (2 * step + number) / 3000, 0.5)
            world.optimizer.step()
        counts = device_tables._powers.cache_info()
    assert counts.misses == 1400
    assert counts.currsize <= 1024


class Lent(np.ndarray):
    """Memory of the host that is overwritten as soon as it is given back."""

    def __del__(self):
        if self.base is not None:
            self.base.fill(-77)


class Lending(Device):
    """Looks, when steps are decided, whether the tables of powers that are read then are still there."""

    def __init__(self):
        super().__init__(runs=False)
        self.lent, self.read = [], 0

    def staging(self, words):
        self.lent.append(np.zeros(words, np.int64))
        return torch.from_numpy(self.lent[-1].view(Lent))

    def launch(self, prepared, programs, args, kind):
        super().launch(prepared, programs, args, kind)
        if prepared.fn.__name__ != "decide":
            return
        config = args[0].numpy().reshape(-1, SET)
        sets = config[1 : 1 + config[0, 0]]
        for numbers, words in zip(sets.view(np.float64), sets, strict=True):
            for beta, powers in (
                (Scalar.ONE_MINUS_BETA1, ToldOfSet.POWERS1),
                (Scalar.ONE_MINUS_BETA2, ToldOfSet.POWERS2),
            ):
                one_minus_beta, address = numbers[beta], words[powers]
                assert ctypes.c_double.from_address(int(address) + 8).value == pytest.approx(one_minus_beta)
                self.read += 1


def test_a_step_finds_the_tables_of_powers_of_all_groups(monkeypatch):
    """However many these are, and whatever betas each has."""
    lending = Lending()
    monkeypatch.setitem(launch._launchers, (1, 0), lending)
    device_tables._powers.cache_clear()
    params = params_of_kinds(600)
    give_gradients(params)
    groups = [{"params": [param], "betas": (0.2 + k / 2000, 0.8 + k / 4000)} for k, param in enumerate(params)]
    optimizer = optim.AdamW(groups, nonfinite="skip")
    with on("cuda"):
        optimizer.init_state()
        optimizer.step()
    assert lending.read == 1200
