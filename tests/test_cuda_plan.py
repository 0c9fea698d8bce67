"""Guards what the CUDA engine tells a device, and when: launches, tables, uploads, and what happens where one fails.

Triton's interpreter works on addresses, so that the CPU's memory can stand for a device's. `Device` is that, and notes
what it is asked to do: how many launches and how many words are uploaded in each step is counted, everything that may
change between two steps is changed, and everything that may fail is made to fail, each compared to the bit with an
engine that keeps no tables. Several devices are rows that are said to be on another one. The arithmetic of the tables
is compared with plain loops.
"""

import collections
import copy
import ctypes
import gc
import itertools
import signal
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

import lucid.optim as optim
from bits import World, assert_same, draw, on, peek, results, snapshot
from lucid import engine
from lucid.engine.cuda import launch, resident
from lucid.engine.cuda.resident import Resident
from lucid.engine.cuda.table import (
    BLOCK,
    CHUNK,
    COLUMNS,
    EIGHT_BIT,
    DeviceRow,
    Geometry,
    Gradients,
    Kind,
    Programs,
    Rows,
    cut,
)

SET = resident.SET


class Device(launch.Interpreter):
    """The CPU's memory as a device that notes what it is asked to do.

    ``runs``: whether kernels are run at all. Memory comes full of what must not be relied on. ``graph``: where what is
    asked for is put off to, while there is one.
    """

    def __init__(self, runs=True):
        self.runs = runs
        self.graph = None
        self.forget()

    def forget(self):
        self.launched, self.uploads, self.prepared = [], [], []
        return self

    @property
    def updates(self):
        return [name for name, _ in self.launched if name == "update"]

    def do(self, act):
        if self.graph is None:
            act()
        else:
            self.graph.append(act)

    def empty(self, words):
        return super().empty(words).fill_(-0x123456789)

    def upload(self, target, staged):
        assert target.numel() == staged.numel()
        self.uploads.append(staged.numel())
        self.do(lambda: target.copy_(staged))

    def prepare(self, kernel, args, kind, warps):
        self.prepared.append(kernel.fn.__name__)
        return super().prepare(kernel, args, kind, warps)

    def launch(self, prepared, programs, args, kind):
        self.launched.append((prepared.fn.__name__, programs))
        if self.runs:
            self.do(lambda: launch.Interpreter.launch(self, prepared, programs, args, kind))


@pytest.fixture(autouse=True)
def one_thread(torch_settings):
    torch.set_num_threads(1)


@pytest.fixture
def device(monkeypatch):
    found = Device()
    monkeypatch.setitem(launch._launchers, (1, 0), found)
    yield found
    resident._powers.cache_clear()


def twin_of(make, steps=0):
    """The same on the CPU engine."""
    with on("cpu"):
        return make().run(steps)


def settled(optimizer):
    """What training gives, step counts included where the device has them."""
    assert optimizer.state is peek(optimizer)
    return results(optimizer)


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


OPTIONS = {
    "plain": {},
    "clipped": {"max_grad_norm": 1.0},
    "skip": {"nonfinite": "skip"},
    "error": {"nonfinite": "error"},
}


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
            assert names["sum_up"] == bool(options) + decides
            programs = collections.Counter()
            for name, each in device.launched:
                programs[name] += each
            assert programs["update"] == count


def words_of_step(rows):
    """What a step uploads where gradients are at new addresses: these, sets, streams, an order, and how to sum up."""
    aligned = [-(-words // 16) * 16 for words in (3 * rows, rows)]
    return sum(aligned) + 3 * -(-rows // CHUNK)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("groups", [1, 3])
def test_only_what_has_changed_is_uploaded(groups, options, device):
    params = params_of_kinds(6)
    give_gradients(params)
    optimizer = optim.AdamW([{"params": params[k::groups]} for k in range(groups)], **options)
    scalars = SET * (1 + groups)
    with on("cuda"):
        optimizer.step()
        first = device.uploads[:]
        for step in range(12):  # until the plan does not even read the state any more
            device.forget()
            change_gradients(params, step)
            optimizer.step()
            powers = [357, 4096] if step == 0 and options not in ({}, OPTIONS["error"]) else []  # of both betas, once
            assert device.uploads == [*powers, scalars]
            assert set(device.prepared) <= {"sum_up", "decide"}  # which are told of this step
        device.forget()
        kept = [param.grad for param in params]  # so that the new ones are elsewhere
        give_gradients(params, 99)
        optimizer.step()
        assert device.uploads == [words_of_step(6), scalars]
        assert set(device.prepared) <= {"sum_up", "decide"}
        device.forget()
        optimizer.step()
        assert device.uploads == [scalars]
    assert len(first) == 3 + bool(options)  # rows, the step, scalars; how to measure
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


# What fails changes nothing


class Failing(Device):
    """The call number `at` of one of its methods fails."""

    def __init__(self, method, at, error=MemoryError):
        self.method, self.left, self.error = method, at, error
        super().__init__()

    def _call(self, method):
        if method == self.method:
            self.left -= 1
            if self.left == 0:
                raise self.error(f"{method} has failed")

    @property
    def failed(self):
        return self.left <= 0

    def empty(self, words):
        self._call("empty")
        return super().empty(words)

    def staging(self, words):
        self._call("staging")
        return launch.Interpreter.empty(self, words)

    def upload(self, target, staged):
        self._call("upload")
        super().upload(target, staged)

    def prepare(self, *args):
        self._call("prepare")
        return super().prepare(*args)

    def stream(self):
        self._call("stream")
        return super().stream()


def nothing(world):
    pass


def now_observed(world):
    world.optimizer.observe()


def now_clipped(world):
    world.optimizer.max_grad_norm = 1.0


def now_other_counts(world):
    """More sets of scalars than there is room for."""
    for index, param in enumerate(world.params):
        world.optimizer.state[param]["step"].fill_(10.0 + index)


def now_amsgrad(world):
    world.optimizer.param_groups[1]["amsgrad"] = True


# What has been done before, on which options, and what is new in the step that fails.
SITUATIONS = {
    "first step": ({}, 0, nothing),
    "first step, clipped": ({"max_grad_norm": 1.0}, 0, nothing),
    "warm": ({}, 2, nothing),
    "warm, clipped": ({"max_grad_norm": 1.0, "nonfinite": "skip"}, 2, nothing),
    "first decision": ({"max_grad_norm": 1.0}, 1, nothing),
    "from now on observed": ({}, 2, now_observed),
    "from now on clipped": ({}, 2, now_clipped),
    "other step counts": ({}, 2, now_other_counts),
    "other step counts, clipped": ({"max_grad_norm": 1.0}, 2, now_other_counts),
    "new rows": ({"max_grad_norm": 1.0}, 2, other_memory),
    "amsgrad": ({"max_grad_norm": 1.0}, 2, now_amsgrad),
}


def two_kinds(**options):
    """So that a launch may be ready and the next one not."""
    world = World(shapes=((3,), (2,), (2, 2)), **options)
    world.optimizer.param_groups[0]["amsgrad"] = True
    return world


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("method", ["prepare", "staging", "empty", "upload", "stream"])
def test_what_fails_before_a_launch_changes_nothing(method, situation, monkeypatch):
    options, warm, change = SITUATIONS[situation]

    def run(world):
        world.run(warm)
        change(world)
        return world

    wanted = twin_of(lambda: run(two_kinds(**options)).run(1))
    with on("cuda"):
        for at in range(1, 100):
            calm = Failing(method, 0)
            monkeypatch.setitem(launch._launchers, (1, 0), calm)
            resident._powers.cache_clear()
            world = run(two_kinds(**options))
            world.set_gradients()
            assert world.optimizer.state is peek(world.optimizer)
            before = snapshot(world.optimizer)
            calm.left = at
            try:
                world.optimizer.step()
            except MemoryError:
                assert snapshot(world.optimizer) == before, f"call {at}"
                assert not calm.updates or warm
            else:
                assert not calm.failed
                break
            world.run(1)
            assert_same(settled(world.optimizer), settled(wanted.optimizer), f"after call {at} has failed")
            assert world.optimizer.skipped_steps == 0
    assert at > 1 or (method, situation) in NEVER


# A warm step asks for no memory of the device, and all that the host decides is ready.
NEVER = {
    ("prepare", "warm"),
    ("prepare", "from now on clipped"),
    *(("empty", situation) for situation in ("warm", "warm, clipped", "first decision")),
}


# Ctrl-C


class Interrupted(Device):
    """Has a signal come after the launches with these numbers."""

    strikes: frozenset[int] = frozenset()
    signal = signal.SIGINT

    def launch(self, prepared, programs, args, kind):
        super().launch(prepared, programs, args, kind)
        if len(self.launched) in self.strikes:
            signal.raise_signal(self.signal)


@pytest.fixture
def interrupted(monkeypatch):
    found = Interrupted()
    monkeypatch.setitem(launch._launchers, (1, 0), found)
    yield found
    resident._powers.cache_clear()


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("strikes", [{1}, {2}, {1, 2, 3, 4, 5, 6}], ids=str)
def test_an_interrupt_between_launches_comes_after_them(strikes, options, interrupted):
    make = lambda: two_kinds(**options)  # noqa: E731
    wanted = [results(twin_of(make, steps).optimizer) for steps in (3, 4)]
    with on("cuda"):
        world = make().run(2)
        world.set_gradients()
        interrupted.forget().strikes = strikes
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            world.optimizer.step()
        assert signal.getsignal(signal.SIGINT) is handler
        interrupted.strikes = frozenset()
        assert len(interrupted.updates) == 2
        assert_same(settled(world.optimizer), wanted[0])
        world.done += 1
        assert_same(settled(world.run(1).optimizer), wanted[1])


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGTERM], ids=lambda number: number.name)
def test_a_handler_that_raises_between_launches_leaves_no_step_half_taken(number, interrupted):
    """Of any signal: schedulers of clusters send others than Ctrl-C's."""

    def stop(*_):
        raise SystemExit

    before = signal.signal(number, stop)
    try:
        with on("cuda"):
            world = two_kinds().run(2)
            interrupted.forget().strikes, interrupted.signal = {1}, number
            world.set_gradients()
            with pytest.raises(SystemExit):
                world.optimizer.step()
            world.done += 1
            interrupted.strikes = frozenset()
            assert_same(settled(world.optimizer), results(twin_of(two_kinds, 3).optimizer))
            assert_same(settled(world.run(1).optimizer), results(twin_of(two_kinds, 4).optimizer))
    finally:
        signal.signal(number, before)


def test_an_own_handler_is_called_after_the_launches(interrupted):
    """Also one that does not raise; and where signals are ignored, or handled outside of Python, nobody is."""
    came = []
    before = signal.getsignal(signal.SIGINT)
    try:
        with on("cuda"):
            world = two_kinds().run(1)
            interrupted.strikes = {1}
            signal.signal(signal.SIGINT, lambda *_: came.append(len(interrupted.launched)))
            interrupted.forget()
            world.run(1)
            assert came == [2]
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            interrupted.forget()
            world.run(1)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == [2]
    assert_same(settled(world.optimizer), results(twin_of(two_kinds, 3).optimizer))


def test_a_step_in_another_thread_leaves_signals_alone(interrupted):
    """Only the main thread may set handlers, and only it is interrupted."""
    make = lambda: two_kinds(max_grad_norm=1.0)  # noqa: E731
    failed = []

    def act():
        try:
            make_steps()
        except BaseException as error:
            failed.append(error)

    with on("cuda"):
        world = make()
        make_steps = lambda: world.run(3)  # noqa: E731
        handler = signal.getsignal(signal.SIGINT)
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGINT) is handler
        assert not failed
        assert_same(settled(world.optimizer), results(twin_of(make, 3).optimizer))


class Signals:
    """Has Ctrl-C come at one of the points at which Python handles signals in some files: calls, and returns from C."""

    FILES = ("engine/plan.py", "cuda/device.py", "cuda/launch.py")

    def __init__(self, at):
        self.left = at
        self.where = None

    def __call__(self, frame, event, _):
        if event not in ("call", "c_return") or not frame.f_code.co_filename.endswith(self.FILES):
            return
        self.left -= 1
        if self.left == 0:
            self.where = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno} ({event})"
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_an_interrupt_anywhere_leaves_no_step_half_taken(options, device):
    """A signal, which what handles it at that moment may put off; an exception at every point is test_atomic's."""
    make = lambda: two_kinds(**options)  # noqa: E731
    wrong = []
    world = None
    for at in range(1, 1000):
        if world is None:
            twin = twin_of(make, 2)
            with on("cuda"):
                world = make().run(2)
        with on("cuda"):
            world.set_gradients()
            assert world.optimizer.state is peek(world.optimizer)
            before = snapshot(world.optimizer)
            signals = Signals(at)
            sys.setprofile(signals)
            try:
                world.optimizer.step()
            except KeyboardInterrupt:
                pass
            finally:
                sys.setprofile(None)
            if signals.where is None:
                break
            found = settled(world.optimizer)
            if snapshot(world.optimizer) != before:
                twin.run(1)
                world.done += 1
        try:
            assert_same(found, results(twin.optimizer))
        except AssertionError as error:
            wrong.append(f"{signals.where}: {str(error)[:100]}")
            world = None
    assert at > 20
    assert world.done > 10
    assert not wrong, "\n".join(dict.fromkeys(wrong))


# Several devices: rows that are said to be on another


class TwoDevices:
    """A native plan of whose parameters every second one is on another device."""

    def __init__(self, groups):
        self.plan = PLAN(groups)
        self.other = {id(param) for param in [param for group in groups for param in group][1::2]}
        self.number = {id(param): k for k, param in enumerate(param for group in groups for param in group)}

    def __getattr__(self, name):
        return getattr(self.plan, name)

    def device_rows(self):
        return [(row, kind, index + row % 2, *rest) for row, kind, index, *rest in self.plan.device_rows()]

    def only_device(self):
        devices = {self.number[id(param)] % 2 for param in self.plan.params()}
        return (1, devices.pop()) if len(devices) == 1 else (0, 0)


PLAN = engine.cpu.Plan


@pytest.fixture
def two_devices(monkeypatch):
    found = [Device(), Device()]
    for index, each in enumerate(found):
        monkeypatch.setitem(launch._launchers, (1, index), each)
    monkeypatch.setattr(engine.cpu, "Plan", TwoDevices)
    yield found
    resident._powers.cache_clear()


SHAPES = ((3, 5), (70, 64), (4, 2, 3), (), (0, 4), (9,), (5000,))


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"max_grad_norm": 0.5, "state_format": "8bit"}], ids=str)
def test_each_device_updates_its_rows(options, two_devices, monkeypatch):
    """The host decides, who alone sees all gradients."""
    with on("cuda"):
        world = World(shapes=SHAPES, **options)
        for step in range(4):
            if step == 3 and options.get("nonfinite") == "skip":
                world.set_gradients()
                world.params[5].grad[3] = torch.nan
                world.optimizer.step()
                assert world.optimizer.skipped_steps == 1
            for each in two_devices:
                each.forget()
            world.run(1)
            counts = [collections.Counter(name for name, _ in each.launched) for each in two_devices]
            assert [names["update"] for names in counts] == [1, 1 + (options.get("state_format") == "8bit")]
            assert [names["decide"] for names in counts] == [0, 0]
            assert [each.uploads[-1] for each in two_devices] == [3 * SET] * 2
        found, norm = settled(world.optimizer), world.optimizer.grad_norm
    monkeypatch.setattr(engine.cpu, "Plan", PLAN)
    wanted = World(shapes=SHAPES, **options).run(4)
    assert_same(found, results(wanted.optimizer))
    assert str(norm) == str(wanted.optimizer.grad_norm)


def test_each_device_decides_what_only_its_rows_take_part_in(two_devices, monkeypatch):
    """And the counts of the one are settled before the other guesses."""
    sequence = [None, None, 0, 0, 1, 0, 1, 1, None, 0, 1, 1, None, 0]
    bad = {3, 6, 9}

    def run(name):
        with on(name):
            world = World(shapes=((3, 5), (7,), (4, 2), ()), nonfinite="skip", max_grad_norm=1.0)
            for step, only in enumerate(sequence):
                world.set_gradients()
                for index, param in enumerate(world.params):
                    if only not in (None, index % 2):
                        param.grad = None
                    elif step in bad and index in (2, 3):
                        param.grad.view(-1)[0] = torch.inf
                world.optimizer.step()
                world.done += 1
            return settled(world.optimizer), world.optimizer.skipped_steps, world.optimizer.grad_norm

    found = run("cuda")
    names = [collections.Counter(name for name, _ in each.launched)["decide"] for each in two_devices]
    monkeypatch.setattr(engine.cpu, "Plan", PLAN)
    wanted = run("cpu")
    assert_same(found[0], wanted[0])
    assert found[1:] == wanted[1:] == (3, wanted[2])
    assert names == [sequence.count(0), sequence.count(1)]


def test_a_device_counts_no_steps_of_another(two_devices, monkeypatch):
    """Nor does it read a number that lies on another."""

    def run(name):
        with on(name):
            world = World(nonfinite="skip").run(2)
            for only in (0, 0, 1, 1):
                world.set_gradients()
                for param in world.params[1 - only :: 2]:
                    param.grad = None
                world.optimizer.found_inf = torch.tensor(float(only == 0))
                world.optimizer.step()
                world.done += 1
            return settled(world.optimizer), world.optimizer.skipped_steps

    found = run("cuda")
    names = [collections.Counter(name for name, _ in each.launched)["decide"] for each in two_devices]
    monkeypatch.setattr(engine.cpu, "Plan", PLAN)
    wanted = run("cpu")
    assert_same(found[0], wanted[0])
    assert found[1] == wanted[1] == 2
    assert names == [2, 2]


def test_no_step_is_captured_on_two_devices(two_devices, monkeypatch):
    with on("cuda"):
        world = World(max_grad_norm=1.0).run(2)
        world.set_gradients()
        before = snapshot(world.optimizer)
        with monkeypatch.context() as patch:
            patch.setattr(engine.cuda, "is_capturing", lambda: True)
            with pytest.raises(RuntimeError, match=r"captured in a CUDA graph.*one GPU"):
                world.optimizer.step()
        assert snapshot(world.optimizer) == before
        found = settled(world.run(1).optimizer)
    monkeypatch.setattr(engine.cpu, "Plan", PLAN)
    assert_same(found, results(World(max_grad_norm=1.0).run(3).optimizer))


# What is kept, and how long


def resident_of(optimizer):
    (found,) = optimizer._whole.plan._device._residents.values()
    return found


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_what_lies_on_a_device_goes_with_the_optimizer(options, device):
    with on("cuda"):
        world = World(**options)
        world.optimizer.observe()
        world.run(2)
        kept = [weakref.ref(x) for x in (resident_of(world.optimizer), world.optimizer._whole.plan._device)]
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


def test_tables_of_powers_do_not_pile_up(device):
    """Schedules that cycle momentum have other betas at each step."""
    device.runs = False
    with on("cuda"):
        world = World(shapes=((2,), (2,)), max_grad_norm=1.0).run(1)
        for step in range(700):
            for number, group in enumerate(world.optimizer.param_groups):
                group["betas"] = (0.1 + (2 * step + number) / 3000, 0.5)
            world.optimizer.step()
        counts = resident._powers.cache_info()
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
            for one_minus_beta, address in ((numbers[1], words[10]), (numbers[3], words[12])):
                assert ctypes.c_double.from_address(int(address) + 8).value == pytest.approx(one_minus_beta)
                self.read += 1


def test_a_step_finds_the_tables_of_powers_of_all_groups(monkeypatch):
    """However many these are, and whatever betas each has."""
    lending = Lending()
    monkeypatch.setitem(launch._launchers, (1, 0), lending)
    resident._powers.cache_clear()
    params = params_of_kinds(600)
    give_gradients(params)
    groups = [{"params": [param], "betas": (0.2 + k / 2000, 0.8 + k / 4000)} for k, param in enumerate(params)]
    optimizer = optim.AdamW(groups, nonfinite="skip")
    with on("cuda"):
        optimizer.init_state()
        optimizer.step()
    assert lending.read == 1200


# The tables by themselves


class Told:
    """A native plan that tells of made-up rows."""

    device_structure = 1

    def __init__(self, rows, lengths, serial=False):
        self.rows, self.lengths, self.serial = rows, lengths, serial

    def device_rows(self):
        return self.rows

    def write_device_rows(self, table, layouts):
        values = np.zeros((len(self.rows), COLUMNS), np.int64)
        values[:, 8] = [row.elements for row in self.rows]
        values[:, 9] = self.lengths
        ctypes.memmove(table, values.tobytes(), values.nbytes)


@st.composite
def told_rows(draw, largest=60_000):
    """Rows of few kinds on one of two devices, encoded ones of rows of their own."""
    rows, lengths = [], []
    for number in range(draw(st.integers(1, 12))):
        moments = draw(st.integers(0, 2))
        length = draw(st.sampled_from([64, 100, 128, 129, 256, 1000])) if moments == EIGHT_BIT else 7
        elements = (
            length * draw(st.integers(0, largest // length)) if moments == EIGHT_BIT else draw(st.integers(0, largest))
        )
        rows.append(
            DeviceRow(
                row=number * 3,
                device_type=1,
                device_index=draw(st.integers(0, 1)),
                compute=draw(st.integers(0, 1)),
                gradient=draw(st.integers(0, 1)),
                form=0,
                moments=moments,
                amsgrad=False,
                dims=0,
                numbered=draw(st.booleans()),
                whole_rows=length % BLOCK == 0,
                wide=True,
                elements=elements,
            )
        )
        lengths.append(length)
    return Told(rows, lengths, draw(st.booleans()))


def geometry_of(kind):
    return Geometry(256 if kind.moments == EIGHT_BIT else 512, 1 + kind.moments, 4)


@given(told_rows())
@settings(deadline=None, max_examples=150)
def test_every_element_is_updated_by_one_program(told):
    rows = Rows(told)
    assert sorted(rows.devices) == sorted({(row.device_type, row.device_index) for row in told.rows})
    for device in rows.devices:
        own = [n for n, row in enumerate(told.rows) if row.device_index == device[1]]
        launches = rows.launches(device, geometry_of)
        seen = []
        for each in launches:
            assert each.geometry == geometry_of(each.kind)
            in_launch = list(dict.fromkeys(each.programs.rows.tolist()))
            assert in_launch == sorted(in_launch)
            assert not told.serial or len(in_launch) == 1
            assert all(Kind.of(told.rows[n]) == each.kind for n in in_launch)
            assert each.programs.packed.tolist() == [
                n + (part << 32)
                for n, part in zip(each.programs.rows.tolist(), each.programs.parts.tolist(), strict=True)
            ]
            for n in in_launch:
                seen.append(n)
                parts = each.programs.parts[each.programs.rows == n].tolist()
                assert parts == list(range(len(parts)))
                elements, length = told.rows[n].elements, told.lengths[n]
                size = each.geometry.tile * each.geometry.tiles
                if not each.kind.whole_rows:  # by blocks, of which the last of a row is not full
                    elements, size = elements // length * -(-length // BLOCK), size // BLOCK
                assert (len(parts) - 1) * size < elements <= len(parts) * size
        assert sorted(seen) == [n for n in own if told.rows[n].elements]
        if told.serial:
            assert seen == sorted(seen)
        else:
            assert len({each.kind for each in launches}) == len(launches)


@given(told_rows(largest=200_000), st.sampled_from([1, 3, 8]))
@settings(deadline=None, max_examples=150)
def test_every_chunk_is_measured_once(told, together):
    rows = Rows(told)
    for device in rows.devices:
        launches, chunks = rows.squares(device, together)
        begins = np.cumsum(chunks) - chunks
        found = {}
        for kind, programs, to in launches:
            for n, part, place in zip(programs.rows.tolist(), programs.parts.tolist(), to.tolist(), strict=True):
                assert Gradients.of(told.rows[n]) == kind
                for k in range(together):  # as the kernel does, where there is such a chunk
                    if (part * together + k) * CHUNK < told.rows[n].elements:
                        assert found.setdefault(place + k, (n, part * together + k)) == (n, part * together + k)
        wanted = [
            (n, chunk)
            for n, row in enumerate(told.rows)
            if row.device_index == device[1]
            for chunk in range(-(-row.elements // CHUNK))
        ]
        assert [found[place] for place in range(len(found))] == wanted
        assert begins[0] == 0
        assert chunks.sum() == len(wanted)
        assert len({kind for kind, *_ in launches}) == len(launches)


@given(st.lists(st.integers(0, 3 * CHUNK), max_size=6), st.integers(0, 5))
@settings(deadline=None, max_examples=100)
def test_sums_are_cut_into_chunks(counts, gap):
    begins = np.array([sum(counts[:k]) + gap * k for k in range(len(counts))], np.int64)
    segments, parts, starts = cut(np.array(counts, np.int64), begins)
    wanted = [
        (begins[k] + first, min(CHUNK, count - first))
        for k, count in enumerate(counts)
        for first in range(0, count, CHUNK)
    ]
    assert list(zip(segments.begin.tolist(), segments.length.tolist(), strict=True)) == wanted
    assert segments.to.tolist() == list(range(len(wanted)))
    assert parts.tolist() == [-(-count // CHUNK) for count in counts]
    assert starts.tolist() == [0, *itertools.accumulate(parts.tolist())][:-1][: len(counts)]


@given(st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 50)), max_size=20))
@settings(deadline=None)
def test_programs_are_the_parts_of_rows_in_order(pairs):
    programs = Programs.of(*(np.array([pair[k] for pair in pairs], np.int64) for k in range(2)))
    wanted = [(row, part) for row, parts in pairs for part in range(parts)]
    assert list(zip(programs.rows.tolist(), programs.parts.tolist(), strict=True)) == wanted
    assert programs.packed.tolist() == [row + (part << 32) for row, part in wanted]


class Counting(Device):
    """Runs what measures as if each chunk's sum were 1, so that rows of billions of elements can be measured."""

    def launch(self, prepared, programs, args, kind):
        name = prepared.fn.__name__
        self.launched.append((name, programs))
        if name == "squares":
            rows, step, tables, _, sums, count, _ = args
            together = kind[-1]
            table = tables.numpy()[: 2 * programs].reshape(2, programs)
            row, part = table[0] & 0xFFFFFFFF, table[0] >> 32
            elements = rows.numpy().reshape(-1)[: count * COLUMNS].reshape(count, COLUMNS)[row, 8]
            given = step.numpy()[row] != 0
            for k in range(together):
                own = given & ((part * together + k) * CHUNK < elements)
                sums.numpy()[table[1][own] + k] += 1
        else:
            values, sums, tables, *_ = args
            begin, length, to = tables.numpy()[: 3 * programs].reshape(3, programs).tolist()
            for first, count, place in zip(begin, length, to, strict=True):
                assert 0 < count <= CHUNK
                sums.numpy()[place] = values.numpy()[first : first + count].sum()


@pytest.mark.parametrize(
    "sizes", [[5], [0, 1], [CHUNK + 1, 0, 7, CHUNK], [3 * CHUNK**2 + 5, 9, 0, 2**33 + 1, CHUNK**2], [1] * 5000], ids=str
)
def test_rows_of_any_size_are_summed_up(sizes):
    """By levels of chunks of sums: a row of 2^33 elements has 2^21 chunks, whose sums are 2^9 chunks."""
    rows = [
        DeviceRow(n, 1, n % 3 == 2, k := n % 2, k, 0, 0, False, 0, False, True, True, size)
        for n, size in enumerate(sizes)
    ]
    table = Rows(Told(rows, [1] * len(rows)))
    counting = Counting()
    on_device = Resident(counting, (1, 0), table)
    step = np.ones((3, len(rows)), np.int64)
    on_device.refresh(step, 1)
    measuring = on_device.measuring()
    for each in measuring.launches:
        counting.launch(each.prepared, each.programs, each.args, each.kind)
    found = measuring.row_sums.tolist()[: len(rows)]
    own = [row.device_index == 0 for row in rows]
    assert found == [-(-size // CHUNK) if mine else 0 for size, mine in zip(sizes, own, strict=True)]
    assert on_device.active(step) == [n for n, mine in enumerate(own) if mine]
