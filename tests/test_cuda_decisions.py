"""Guards what a step leaves to the device: that it decides as the host would, that nobody waits, and who counts.

What a device decides, a clip factor, which steps are left out, where the step counts then are, is compared to the bit
with the CPU engine, whose host decides, over long random sequences. That nobody waits is shown in two ways: on a device
that runs nothing until someone reads from it; and with memory that no code of the host may read, which ends a process
that tries. Steps that are captured in a CUDA graph are put off, uploads and torch's own operations included, and then
run again and again as a graph is, between steps that are taken at once.
"""

import contextlib
import copy
import ctypes
import itertools
import math
import mmap
import pickle
import random
import signal
import threading

import pytest
import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bits import World, assert_same, draw, in_child, on, peek, results, same, snapshot
from lucid import engine
from lucid.engine.cuda import launch, resident
from test_cuda_plan import Device, settled

SHAPES = ((70, 64), (7,), (2, 5), (), (33,), (129,))  # the first is encoded where there are eight bits
KINDS = {
    "float32": (torch.float32, {}),
    "float32, bf16": (torch.float32, {"state_format": "bf16"}),
    "float32, 8bit": (torch.float32, {"state_format": "8bit", "amsgrad": True}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16, 8bit": (torch.bfloat16, {"state_format": "8bit"}),
    "float16, bf16": (torch.float16, {"state_format": "bf16", "amsgrad": True}),
    "float64": (torch.float64, {}),
    "complex64": (torch.complex64, {"maximize": True}),
}
every_kind = pytest.mark.parametrize(("dtype", "options"), KINDS.values(), ids=KINDS.keys())


@pytest.fixture(autouse=True)
def one_thread(torch_settings):
    torch.set_num_threads(1)


@pytest.fixture
def device(monkeypatch):
    found = Device()
    monkeypatch.setitem(launch._launchers, (1, 0), found)
    yield found
    resident._powers.cache_clear()


def decisions(device):
    return sum(name == "decide" for name, _ in device.launched)


# The device decides as the host does


class Pair:
    """The same steps on the CUDA engine, whose device decides, and on the CPU engine, whose host does."""

    names = ("cuda", "cpu")

    def __init__(self, dtype=torch.float32, shapes=World.SHAPES, **options):
        self.worlds = self.ours, self.theirs = [World(dtype, shapes, **options) for _ in range(2)]

    def each(self, act):
        found = []
        for name, world in zip(self.names, self.worlds, strict=True):
            with on(name):
                found.append(act(world))
        return found

    def step(self):
        self.each(lambda world: world.optimizer.step())
        for world in self.worlds:
            world.done += 1

    def compare(self, what=""):
        left, right = self.each(lambda world: (settled(world.optimizer), world.optimizer.skipped_steps))
        assert_same(left[0], right[0], what)
        assert left[1] == right[1], what

    def compare_norms(self, what=""):
        left, right = self.each(lambda world: world.optimizer.grad_norm)
        if right is not None:  # else the host knew without measuring
            assert same(left, right), (what, left, right)

    def compare_statistics(self, what=""):
        left, right = self.each(lambda world: world.optimizer.statistics())
        assert left.keys() == right.keys(), what
        for key in left:
            assert left[key] == pytest.approx(right[key], rel=1e-5, nan_ok=True), (what, key)


def bad_values(dtype):
    real = dtype.to_real() if dtype.is_complex else dtype
    large = {torch.float64: 2.0**600, torch.float16: math.inf}.get(real, 2.0**70)
    return math.nan, math.inf, -math.inf, large


def random_gradients(pair, chance, dtype, spoil):
    """Of any size; some parameters have none; where there is something to `spoil`, one number of one is bad."""
    seeds = [chance.randrange(2**30) for _ in SHAPES]
    size = 10.0 ** chance.randrange(-3, 3)
    given = [chance.random() > 0.1 for _ in SHAPES]
    gradients = [
        (draw(seed, shape, dtype if dtype.is_complex else torch.float32) * size).to(dtype) if has else None
        for seed, shape, has in zip(seeds, SHAPES, given, strict=True)
    ]
    if spoil:
        which = chance.choice([k for k, g in enumerate(gradients) if g is not None and g.numel()] or [None])
        if which is not None:
            reals = torch.view_as_real(gradients[which]) if dtype.is_complex else gradients[which]
            reals.view(-1)[chance.randrange(reals.numel())] = chance.choice(bad_values(dtype))
    for world in pair.worlds:
        for param, gradient in zip(world.params, gradients, strict=True):
            param.grad = None if gradient is None else gradient.clone()


def reread(optimizer, how):
    """Everything that shows step counts; a copy goes on in the place of what it is a copy of."""
    if how == "state":
        assert len(optimizer.state)
    elif how == "skipped_steps":
        assert optimizer.skipped_steps >= 0
    elif how == "state_dict":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif how == "pickle":
        return pickle.loads(pickle.dumps(optimizer))
    elif how == "deepcopy":
        return copy.deepcopy(optimizer)
    return optimizer


RARELY = ("state", "skipped_steps", "state_dict", "pickle", "deepcopy")


@every_kind
def test_long_random_sequences(dtype, options, device):
    chance = random.Random(str((dtype, options)))
    pair = Pair(dtype, SHAPES, nonfinite="skip", **options)
    rates = [[torch.tensor(0.01 * (1 + k), dtype=kind) for k in range(2)] for kind in (torch.float32, torch.float64)]
    pair.each(lambda world: world.optimizer.observe())
    for step in range(18):
        what = f"step {step}"
        random_gradients(pair, chance, dtype, spoil=chance.random() < 0.3)
        scale = chance.choice([None, None, 2.0**-3, 1000.0])
        found_inf = chance.choice([None, 0.0, 0.0, 1.0])
        bound = chance.choice([None, 0.5, 10.0, math.inf])
        rate = chance.choice([0.02, *rates])
        if isinstance(rate, list):
            for tensor in rate:
                tensor.mul_(0.9)
        beta1 = chance.choice([0.9, 0.9, 0.3])

        for world in pair.worlds:
            optimizer = world.optimizer
            optimizer.max_grad_norm = bound
            optimizer.grad_scale = None if scale is None else torch.tensor(scale)
            optimizer.found_inf = None if found_inf is None else torch.tensor(found_inf)
            for number, group in enumerate(optimizer.param_groups):
                group["lr"] = rate[number] if isinstance(rate, list) else rate * (1 + number)
            optimizer.param_groups[0]["beta1"] = beta1
        before = pair.theirs.optimizer._skipped_steps
        pair.step()
        if not (found_inf and bound is None):
            pair.compare_norms(what)
        if chance.random() < 0.4:
            how = chance.choice(RARELY)
            for world in pair.worlds:
                world.optimizer = reread(world.optimizer, how)
                world.params = [param for group in world.optimizer.param_groups for param in group["params"]]
        if step % 3 == 2:
            pair.compare(what)
        if before == pair.theirs.optimizer._skipped_steps and pair.theirs.optimizer._seen:
            pair.compare_statistics(what)
    pair.compare("at last")
    assert decisions(device) > 8
    assert 2 < pair.ours.optimizer.skipped_steps < 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bad_gradients_propagate_where_they_are_to(dtype, device):
    """A norm that is no number makes everything so, an infinite one zero; what `found_inf` says is left out."""
    for bad, bound in itertools.product([None, *bad_values(dtype)], [1.0, math.inf]):
        pair = Pair(dtype, ((3, 2), (7,)), max_grad_norm=bound)
        for step in range(4):
            pair.each(lambda world: world.set_gradients())
            for world in pair.worlds:
                if step == 2 and bad is not None:
                    world.params[1].grad[3] = bad
                world.optimizer.found_inf = torch.tensor(float(step == 1))
            pair.step()
            pair.compare_norms(f"{bad}, step {step}")
        pair.compare(f"{bad}")
        assert pair.ours.optimizer.skipped_steps == 1


SCHEDULES = {
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
    "CosineAnnealingLR": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
}


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_schedules(schedule, tensors, device):
    pair = Pair(nonfinite="skip", max_grad_norm=1.0)
    for world in pair.worlds:
        for group in world.optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"]) if tensors else group["lr"]
    schedules = [schedule(world.optimizer) for world in pair.worlds]
    for step in range(14):
        pair.each(lambda world: world.set_gradients())
        if step % 4 == 3:
            for world in pair.worlds:
                world.params[2].grad[0, 1, 1] = math.nan
        pair.step()
        for each in schedules:
            each.step()
        pair.compare_norms()
    pair.compare()
    assert decisions(device) == 13


def test_a_learning_rate_in_any_tensor(device):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64):
        for shape in ((), (1,)):
            pair = Pair()
            rate = torch.ones(shape, dtype=dtype) / (1 if dtype == torch.int64 else 7)
            rate = rate.to(dtype)
            for world in pair.worlds:
                world.optimizer.param_groups[0]["lr"] = rate
            for _ in range(3):
                pair.each(lambda world: world.set_gradients())
                pair.step()
            pair.compare(str(dtype))
    assert decisions(device) == 2 * 10


def test_rows_that_take_part_now_and_then(device):
    """The counts of others are settled first; each group has several step counts; one parameter starts late."""
    pair = Pair(shapes=SHAPES, nonfinite="skip", max_grad_norm=1.0)
    chance = random.Random(3)
    for step in range(25):
        pair.each(lambda world: world.set_gradients())
        active = chance.choice([{0, 1, 2, 3, 4}, {1, 2}, {0, 3, 4}, {1}]) | ({5} if step > 12 else set())
        spoiled = min(active) if chance.random() < 0.3 else None
        for world in pair.worlds:
            for index, param in enumerate(world.params):
                if index not in active:
                    param.grad = None
            if spoiled is not None:
                world.params[spoiled].grad.view(-1)[0] = math.inf
        pair.step()
        if step % 5 == 4:
            pair.compare(f"step {step}")
    counts = {int(row["step"]) for row in settled(pair.ours.optimizer)}
    assert len(counts) >= 4
    assert decisions(device) > 15


@pytest.mark.parametrize("size", [2, 0], ids=["", "some of them empty"])
def test_many_rows(size, device):
    """Where a row's sum stands among the others' decides the last bit of the norm."""
    pair = Pair(shapes=[(5,), (size,), (3,)] * 15, max_grad_norm=1.0)
    pair.each(lambda world: world.optimizer.observe())
    for step in range(6):
        for world in pair.worlds:
            world.set_gradients()
            for k, param in enumerate(world.params):
                param.grad *= 10.0 ** (k % 5)
        pair.step()
        pair.compare_norms(f"step {step}")
        pair.compare_statistics(f"step {step}")
    pair.compare()


# Statistics


@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_step_that_the_device_leaves_out_keeps_the_statistics(first, device):
    """As one that the host leaves out: `statistics` tells of the last step that was taken."""
    pair = Pair(nonfinite="skip")
    pair.each(lambda world: world.optimizer.observe())
    for step in range(5):
        pair.each(lambda world: world.set_gradients())
        for world in pair.worlds:
            world.optimizer.grad_scale = torch.tensor(4.0 + step)
            if step > first:
                world.params[1].grad[2] = math.nan
        pair.step()
        pair.compare_statistics(f"step {step}")


# In backward


def test_steps_in_backward(device):
    pair = Pair(nonfinite="skip")
    for world in pair.worlds:
        world.optimizer.step_in_backward()
        world.optimizer.observe()
    chance = random.Random(5)
    for step in range(12):
        bad = chance.choice([None, None, 0, 1, 5])
        for name, world in zip(pair.names, pair.worlds, strict=True):
            with on(name):
                losses = [
                    (param * draw(100 * step + k, param.shape) * (math.nan if k == bad and step else 1.0)).sum()
                    for k, param in enumerate(world.params)
                ]
                sum(losses).backward()
                world.optimizer.step()
                assert all(param.grad is None for param in world.params)
        if step % 4 == 3:
            pair.compare(f"step {step}")
    pair.compare_statistics()
    assert decisions(device) == 4 * 11
    assert pair.ours.optimizer.skipped_steps > 2


def test_steps_left_out_in_backward_of_a_group_that_is_gone(device):
    pair = Pair(nonfinite="skip")
    for world in pair.worlds:
        world.optimizer.step_in_backward()
    for bad in (False, True):
        pair.each(
            lambda world, bad=bad: sum(
                (param * (math.nan if bad else 2.0)).sum() for param in world.params if param.numel()
            ).backward()
        )
    for world in pair.worlds:
        del world.optimizer.param_groups[1]
    ours, theirs = pair.each(lambda world: world.optimizer.skipped_steps)
    assert ours == theirs == 4


# Who counts


def test_a_copy_made_in_the_middle_has_right_counts(device):
    """And neither the copy nor the original counts what the other's device decides."""
    pair = Pair(nonfinite="skip")

    def steps(count, bad):
        for step in range(count):
            pair.each(lambda world: world.set_gradients())
            for world in pair.worlds:
                if step in bad:
                    world.params[1].grad[0] = math.nan
            pair.step()

    steps(6, {2, 4})
    copies = [copy.deepcopy(world.optimizer) for world in pair.worlds]
    params = [[param for group in each.param_groups for param in group["params"]] for each in copies]
    steps(3, {0, 1})
    pair.compare("the original")
    for world, each, own in zip(pair.worlds, copies, params, strict=True):
        world.optimizer, world.params = each, own
    pair.compare("the copy")
    steps(3, {1})
    pair.compare("the copy, later")
    assert pair.ours.optimizer.skipped_steps == 3


def test_counts_of_state_that_is_replaced_are_the_new_ones(device):
    pair = Pair(nonfinite="skip")

    def bad_step(world):
        world.set_gradients()
        world.params[1].grad[0] = math.nan
        world.optimizer.step()
        world.done += 1

    def act(world):
        world.run(2)
        saved = copy.deepcopy(world.optimizer.state_dict())
        world.run(2)
        bad_step(world)
        world.optimizer.load_state_dict(saved)
        bad_step(world)
        state = copy.deepcopy(dict(world.optimizer.state))
        world.optimizer.state = {param: state[twin] for param, twin in zip(world.params, state, strict=True)}
        bad_step(world)
        world.run(2)
        world.optimizer.state[world.params[2]]["step"] = torch.tensor(20.0)
        bad_step(world)
        world.run(1)
        del world.optimizer.state[world.params[3]]
        bad_step(world)
        world.run(2)

    pair.each(act)
    pair.compare()
    assert pair.ours.optimizer.skipped_steps == 5


def test_a_step_in_another_thread_while_counts_are_settled(device):
    """What the device decides while it is waited for must not be taken for settled."""
    with on("cuda"):
        world = World(nonfinite="skip").run(2)

        def bad_step():
            world.set_gradients()
            world.params[1].grad[0] = math.nan
            world.optimizer.step()

        bad_step()
        plan = world.optimizer._whole.plan._device
        native = plan._native
        threads = []

        class Interrupting:
            def __getattr__(self, name):
                return getattr(native, name)

            def settle(self, *args, **kwargs):
                if not threads:
                    threads.append(threading.Thread(target=bad_step))
                    threads[0].start()
                    threads[0].join(1.0)  # it may have to wait until this is over
                return native.settle(*args, **kwargs)

        plan._native = Interrupting()
        assert world.optimizer.state is peek(world.optimizer)
        (thread,) = threads
        thread.join()
        plan._native = native
        assert [entry["step"].item() for entry in world.optimizer.state.values()] == [2.0] * 4
        assert world.optimizer.skipped_steps == 2


# Nobody waits


OPTIONS = {
    "plain": {},
    "clipped": {"max_grad_norm": 1.0},
    "skip": {"nonfinite": "skip"},
    "scaled": {"scaled": True},
    "lr": {"rate": True},
    "observed": {"observed": True},
    "all": {"max_grad_norm": 1.0, "nonfinite": "skip", "scaled": True, "rate": True, "observed": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


class Late(Device):
    """Runs nothing before someone reads what is in its memory: then all that it was asked for, in order."""

    def __init__(self):
        super().__init__()
        self.graph = []
        self.memory = []
        self.read = 0

    def empty(self, words):
        found = super().empty(words)
        self.memory.append(found)
        return found

    def staging(self, words):
        return launch.Interpreter.empty(self, words)

    def catch_up(self):
        acts, self.graph = self.graph, []
        for act in acts:
            act()

    def holds(self, tensor):
        place = tensor.untyped_storage().data_ptr()
        return any(place == own.untyped_storage().data_ptr() for own in self.memory)


@every_option
def test_a_device_may_run_late(options, monkeypatch):
    """A whole sequence of steps is asked for before the first of them runs."""
    late = Late()
    monkeypatch.setitem(launch._launchers, (1, 0), late)
    resident._powers.cache_clear()
    tolist = torch.Tensor.tolist

    def waiting(tensor):
        if late.holds(tensor):
            late.read += 1
            late.catch_up()
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", waiting)
    given = {key: value for key, value in options.items() if key in ("max_grad_norm", "nonfinite")}
    pair = Pair(**given)
    kept = []
    if options.get("observed"):
        pair.each(lambda world: world.optimizer.observe())
    for step in range(7):
        for world in pair.worlds:
            optimizer = world.optimizer
            world.set_gradients()
            if step in (3, 4) and options.get("nonfinite"):
                world.params[1].grad[0] = math.nan
            if options.get("scaled"):
                optimizer.grad_scale = torch.tensor(2.0 ** (10 - step))
                optimizer.found_inf = torch.tensor(float(step == 2))
            if options.get("rate"):
                optimizer.param_groups[0]["lr"] = torch.tensor(0.01 * (step + 1))
            # A device gives out memory in the order of what it runs, so that there none of it is used anew too early.
            kept += [*(param.grad for param in world.params), optimizer.param_groups[0]["lr"]]
            kept += [vars(optimizer).get("grad_scale"), vars(optimizer).get("found_inf")]
        if step == 1:
            late.catch_up()  # new state: the host has decided
            late.read = 0
        pair.step()
    assert len(late.graph) > 6
    assert late.read == 0
    if not decisions(late):
        late.catch_up()  # the host has counted, nobody has to wait
    pair.compare()
    late.catch_up()
    pair.compare()
    pair.compare_norms()


class Forbidden:
    """Memory of a page's size times some, which nobody may read or write but within `allowed`."""

    def __init__(self, size=1 << 22):
        self.memory = mmap.mmap(-1, size)
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.size, self.used = size, 0
        self.depth = 1
        self.protect = ctypes.CDLL(None, use_errno=True).mprotect

    def tensor(self, values):
        """Return a copy of `values` there."""
        count = values.numel() * values.element_size()
        assert self.used + count <= self.size
        own = self.bytes[self.used : self.used + count].view(values.dtype).view(values.shape)
        self.used += -(-max(count, 1) // 64) * 64
        with self.allowed():
            own.copy_(values)
        return own

    def set(self, rights):
        address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(self.memory)))
        assert self.protect(address, ctypes.c_size_t(self.size), rights) == 0

    @contextlib.contextmanager
    def allowed(self):
        if self.depth == 0:
            self.set(mmap.PROT_READ | mmap.PROT_WRITE)
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                self.set(0)

    @contextlib.contextmanager
    def forbidden(self):
        self.depth -= 1
        self.set(0)
        try:
            yield
        finally:
            self.depth += 1
            self.set(mmap.PROT_READ | mmap.PROT_WRITE)


class Guarded(Device):
    """A device whose memory only its kernels and copies reach."""

    def __init__(self, memory):
        self.memory = memory
        super().__init__()

    def empty(self, words):
        return self.memory.tensor(torch.full((words,), -77, dtype=torch.int64))

    def staging(self, words):
        return launch.Interpreter.empty(self, words)

    def do(self, act):
        with self.memory.allowed(), _disable_current_modes():
            act()


class OnDevice(TorchDispatchMode):
    """Operations of torch run on the device too, but for those whose result is the host's."""

    def __init__(self, memory, hosts):
        super().__init__()
        self.memory, self.hosts, self.seen = memory, hosts, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name == "aten::_local_scalar_dense":
            assert args[0].data_ptr() in self.hosts, "a number of the device was read"
        elif not func.is_view and func.namespace == "aten":
            self.seen.add(name)
        with self.memory.allowed():
            return func(*args, **(kwargs or {}))


@every_option
def test_no_code_of_the_host_reads_a_device(options):
    """Not in a warm step: who tries, in Python or C++, ends the process, here a child."""

    def act():
        torch.set_num_threads(1)
        memory = Forbidden()
        launch._launchers[1, 0] = Guarded(memory)
        with on("cuda"):
            given = {key: value for key, value in options.items() if key in ("max_grad_norm", "nonfinite")}
            world = World(shapes=((70, 64), (7,), (3, 5)), state_format="8bit", **given)
            optimizer = world.optimizer
            for param in world.params:
                param.data = memory.tensor(param.data)
            optimizer.observe(options.get("observed", False))
            world.run(1)
            for entry in optimizer.state.values():
                for key in entry.keys() - {"step", "stream"}:
                    entry[key] = memory.tensor(entry[key])
            hosts = {
                entry[key].data_ptr() for entry in optimizer.state.values() for key in ("step", "stream") & entry.keys()
            }
            for step in range(11):  # until the plan no longer reads the state
                world.set_gradients()
                for param in world.params:
                    param.grad = memory.tensor(param.grad)
                if options.get("scaled"):
                    optimizer.grad_scale = memory.tensor(torch.tensor(4.0))
                    optimizer.found_inf = memory.tensor(torch.tensor(float(step == 9)))
                if options.get("rate"):
                    optimizer.param_groups[1]["lr"] = memory.tensor(torch.tensor(0.01 * (step + 1)))
                with OnDevice(memory, hosts) as operations, memory.forbidden():
                    optimizer.step()
                    optimizer.zero_grad()
                    norm, scale = optimizer.grad_norm, optimizer._scale
                if step > 2:
                    assert operations.seen <= {
                        "aten::empty",
                        "aten::zeros",
                        "aten::clone",
                    }  # the host's own; the norm's
                world.done += 1
            assert (norm is None) == (not given)
            assert scale is not None
            left_out = int(options.get("scaled", False))
            assert optimizer.skipped_steps == left_out
            assert {entry["step"].item() for entry in optimizer.state.values()} == {12.0 - left_out}

    in_child(act)


def test_who_reads_a_device_is_caught():
    """So that the test above can fail: by an operation of torch's, and by an address."""
    for read in (torch.Tensor.tolist, torch.Tensor.item, lambda tensor: tensor.numpy().sum()):

        def act(read=read):
            memory = Forbidden()
            value = memory.tensor(torch.ones(1))
            with OnDevice(memory, set()), memory.forbidden():
                read(value)

        with pytest.raises(AssertionError, match=r"the child ended"):
            in_child(act)


# CUDA graphs


class PutOff(TorchDispatchMode):
    """While a step is captured, torch's own operations are put off with the launches; none of their results exist."""

    def __init__(self, device, hosts):
        super().__init__()
        self.device, self.hosts = device, hosts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name == "aten::_local_scalar_dense":
            assert args[0].data_ptr() in self.hosts, "a number of the device was read while a step is captured"
            return func(*args, **kwargs)
        if func.is_view or func.namespace != "aten" or name in ("aten::empty", "aten::detach"):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            if args[0].untyped_storage().data_ptr() in self.device.fresh:  # memory that `Device.empty` fills
                return func(*args, **kwargs)
            self.device.graph.append(lambda: func(*args, **kwargs))
            return args[0]
        result = func(*args, **kwargs)
        self.device.graph.append(lambda: result.copy_(func(*args, **kwargs)))
        return result.fill_(math.nan) if result.is_floating_point() else result.fill_(1)


class Capturing(Device):
    """A device on which steps can be captured."""

    def __init__(self):
        super().__init__()
        self.fresh = set()

    def empty(self, words):
        found = launch.Interpreter.empty(self, words)
        self.fresh.add(found.untyped_storage().data_ptr())
        found.fill_(-77)
        self.fresh.clear()
        return found

    @contextlib.contextmanager
    def captures(self, optimizer):
        """What is launched within is not run; it comes as a list of what a graph would do."""
        hosts = {
            entry[key].data_ptr() for entry in peek(optimizer).values() for key in ("step", "stream") if key in entry
        }
        before = engine.cuda.is_capturing
        engine.cuda.is_capturing = lambda: True
        self.graph = graph = []
        try:
            with PutOff(self, hosts):
                yield graph
        finally:
            self.graph, engine.cuda.is_capturing = None, before


@pytest.fixture
def capturing(monkeypatch):
    found = Capturing()
    monkeypatch.setitem(launch._launchers, (1, 0), found)
    monkeypatch.setattr(engine.cuda, "is_capturing", engine.cuda.is_capturing)
    yield found
    resident._powers.cache_clear()


def replay(graph):
    for act in graph:
        act()


class Trainer:
    """Gradients, a scale and learning rates that stay where they are; steps at once or by graphs, by letter.

    a, b: a step by a graph of that name, captured when it is first asked for. e: a step at once. s, k, d, o: someone
    reads the state, the skipped steps, makes a copy, reads the norm. n: the next step's gradients are bad. l: other
    learning rates. f: GradScaler has found an overflow, for the next step.
    """

    def __init__(self, device, dtype=torch.float32, shapes=((3, 5), (7,), (2, 2), ()), warm=2, **options):
        self.device, self.graphs = device, {}
        self.world = World(dtype, shapes, **{"nonfinite": "skip", **options})
        self.optimizer, self.params = self.world.optimizer, self.world.params
        for param in self.params:
            param.grad = torch.zeros_like(param)
        self.rates = [torch.tensor(0.01), torch.tensor(0.03)]
        self.scale, self.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
        self.done, self.bad = 0, False
        self.norms = []
        for _ in range(warm):
            self.step("e")

    def set_gradients(self):
        for index, param in enumerate(self.params):
            if param.grad is not None:
                param.grad.copy_(draw(1000 * (self.done + 1) + index, param.shape, param.dtype))
                if self.bad and index == 1:
                    param.grad.view(-1)[-1] = math.nan
        self.bad = False
        self.done += 1

    def take(self):
        self.optimizer.grad_scale, self.optimizer.found_inf = self.scale, self.found_inf
        self.optimizer.step()

    def step(self, name):
        self.set_gradients()
        if name == "e" or self.device is None:
            self.take()
        else:
            if name not in self.graphs:
                with self.device.captures(self.optimizer) as graph:
                    self.take()
                self.graphs[name] = graph
            replay(self.graphs[name])
        self.found_inf.zero_()

    def act(self, letter):
        if letter in "abe":
            self.step(letter)
        elif letter == "s":
            assert len(self.optimizer.state) >= len(self.params)
        elif letter == "k":
            self.norms.append(self.optimizer.skipped_steps)
        elif letter == "d":
            self.norms.append(settled(copy.deepcopy(self.optimizer)))
        elif letter == "o":
            norm = self.optimizer.grad_norm
            self.norms.append(None if norm is None else norm.item())
        elif letter == "n":
            self.bad = True
        elif letter == "f":
            self.found_inf.fill_(1.0)
        elif letter == "l":
            for rate in self.rates:
                rate.mul_(0.7)

    def run(self, script):
        for letter in script:
            self.act(letter)
        return self


def check_graphs(capturing, script, **options):
    with on("cpu"):
        wanted = Trainer(None, **options).run(script)
    with on("cuda"):
        found = Trainer(capturing, **options).run(script)
    assert_same(settled(found.optimizer), results(wanted.optimizer), script)
    assert found.optimizer.skipped_steps == wanted.optimizer.skipped_steps
    for ours, theirs in zip(found.norms, wanted.norms, strict=True):
        if isinstance(theirs, list):
            assert_same(ours, theirs, script)
        elif theirs is not None:
            assert ours == pytest.approx(theirs, nan_ok=True, rel=0, abs=0)
    return found


SCRIPTS = {
    "one": "a",
    "replays": "aaaa",
    "read in between": "asaaskasds",
    "steps at once in between": "aeaeea",
    "two graphs": "abbaab",
    "two graphs, steps, reads": "aebsabekba",
    "bad gradients": "naanaenekanasna",
    "found by GradScaler": "fafefaafsea",
    "other learning rates": "alalaeleala",
    "norms": "aonaoaoeoao",
}
random_scripts = ["".join(random.Random(seed).choices("aabbeeesknnfldo", k=25)) for seed in range(3)]


@pytest.mark.parametrize("script", [*SCRIPTS.values(), *random_scripts], ids=[*SCRIPTS, *map(str, range(3))])
def test_replays_are_steps(script, capturing):
    check_graphs(capturing, script, max_grad_norm=1.0)


@pytest.mark.parametrize("how", [{}, {"max_grad_norm": 0.1}, {"nonfinite": "propagate"}], ids=str)
@every_kind
def test_replays_are_steps_in_every_format(dtype, options, how, capturing):
    script = "aasea" if how.get("nonfinite") == "propagate" else "aanslaea"
    shapes = ((64, 64) if options.get("state_format") == "8bit" else (3, 5), (7,))
    check_graphs(capturing, script, dtype=dtype, shapes=shapes, **options, **how)


def test_a_graph_captured_first_of_all_that_is_decided(capturing):
    """What the device keeps from step to step must not be made anew by the graph."""

    def run(name):
        with on(name):
            world = World().run(1)
            world.set_gradients()
            for _ in range(3):
                if name == "cuda":
                    if not graphs:
                        with capturing.captures(world.optimizer) as graph:
                            world.optimizer.step()
                        graphs.append(graph)
                    replay(graphs[0])
                else:
                    world.optimizer.step()
            return settled(world.optimizer)

    graphs = []
    assert_same(run("cuda"), run("cpu"))


def refused(optimizer, act):
    """Whether `act` is refused for the sake of captured steps; nothing is changed then."""
    assert optimizer.state is peek(optimizer)
    before = snapshot(optimizer)
    try:
        act()
    except RuntimeError as error:
        assert "captured in" in str(error)  # noqa: PT017
        assert "CUDA graph" in str(error)  # noqa: PT017
        assert optimizer.state is peek(optimizer)
        assert snapshot(optimizer) == before
        return True
    return False


def some_rows_alone(trainer):
    """Rows that shared a step count when they were captured would do so no longer."""
    left_out, trainer.params[1].grad = trainer.params[1].grad, None
    return lambda: setattr(trainer.params[1], "grad", left_out)


def one_row_more(trainer):
    late = Parameter(torch.ones(3))
    trainer.optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(3)
    return lambda: setattr(late, "grad", None)


def another_row_in_the_place_of_one(trainer):
    left_out, trainer.params[1].grad = trainer.params[1].grad, None  # which graphs go on to read
    late = Parameter(torch.ones(3))
    trainer.optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(3)
    return lambda: (
        setattr(late, "grad", None),
        setattr(trainer.params[1], "grad", left_out),
    )


@pytest.mark.parametrize("change", [some_rows_alone, one_row_more, another_row_in_the_place_of_one])
def test_a_step_of_other_rows_is_refused_or_counted_for_the_graphs(change, capturing):
    """The counts of all rows that a device decides are guessed together, and a graph knows its own only."""
    shapes = ((3,), (4,), (5,), (6,))
    with on("cuda"):
        found = Trainer(capturing, shapes=shapes).run("aa")
        back = change(found)
        found.set_gradients()
        no = refused(found.optimizer, found.take)
        back()
        found.run("aasaea")
    with on("cpu"):
        wanted = Trainer(None, shapes=shapes).run("aa")
        back = change(wanted)
        wanted.set_gradients()
        if not no:
            wanted.take()
        back()
        wanted.run("aasaea")
    assert_same(settled(found.optimizer), results(wanted.optimizer))


def test_a_step_without_gradients_is_none(capturing):
    with on("cuda"):
        found = Trainer(capturing, max_grad_norm=1.0).run("aa")
        kept = [param.grad for param in found.params]
        found.optimizer.zero_grad()
        found.optimizer.step()
        for param, gradient in zip(found.params, kept, strict=True):
            param.grad = gradient
        found.run("aea")
    with on("cpu"):
        wanted = Trainer(None, max_grad_norm=1.0).run("aaaea")
    assert_same(settled(found.optimizer), results(wanted.optimizer))


def test_state_that_is_loaded_lets_captured_steps_go(capturing):
    """What the old graph counts is nobody's any more; steps of any rows are taken, and captured anew."""

    def run(name):
        with on(name):
            trainer = Trainer(capturing if name == "cuda" else None, shapes=((3,), (4,), (5,), (6,)))
            trainer.run("aana")
            trainer.optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
            trainer.graphs.clear()
            left_out, trainer.params[1].grad = trainer.params[1].grad, None
            trainer.run("ene")
            trainer.params[1].grad = left_out
            trainer.run("eaansa")
            return settled(trainer.optimizer), trainer.optimizer.skipped_steps

    ours, theirs = run("cuda"), run("cpu")
    assert_same(ours[0], theirs[0])
    assert ours[1] == theirs[1] == 2


def test_an_interrupted_step_is_counted_for_the_graphs(capturing, monkeypatch):
    """Ctrl-C is raised after the step; a graph that is run next counts on from it."""
    launched = []

    def interrupting(*args):
        Device.launch(capturing, *args)
        launched.append(args)
        if len(launched) == 1:
            signal.raise_signal(signal.SIGINT)

    with on("cpu"):
        wanted = Trainer(None, max_grad_norm=1.0).run("aaeaa")
    with on("cuda"):
        found = Trainer(capturing, max_grad_norm=1.0).run("aa")
        with monkeypatch.context() as patch:
            patch.setattr(capturing, "launch", interrupting)
            with pytest.raises(KeyboardInterrupt):
                found.run("e")
        found.run("aa")
        assert_same(settled(found.optimizer), results(wanted.optimizer))


# What cannot be captured


def on_the_cpu_engine(world):
    return engine.only("cpu")


def without_state(world):
    world.optimizer.state.clear()


def with_a_new_parameter(world):
    world.params.append(Parameter(torch.ones(3)))
    world.optimizer.add_param_group({"params": [world.params[-1]]})


def with_errors(world):
    world.optimizer.nonfinite = "error"


def with_amsgrad(world):
    world.optimizer.param_groups[0]["amsgrad"] = True


REFUSED = {
    on_the_cpu_engine: "one GPU",
    without_state: "before",
    with_a_new_parameter: "before",
    with_errors: "error",
    with_amsgrad: "before",
}


@pytest.mark.parametrize("captured_before", [False, True], ids=["", "after another"])
@pytest.mark.parametrize(("change", "message"), REFUSED.items(), ids=[f.__name__ for f in REFUSED])
def test_what_cannot_be_captured_is_refused(change, message, captured_before, capturing):
    with on("cuda"):
        world = World(max_grad_norm=1.0).run(2)
        if captured_before:
            world.set_gradients()
            with capturing.captures(world.optimizer) as graph:
                world.optimizer.step()
            replay(graph)
        context = change(world) or contextlib.nullcontext()
        world.set_gradients()
        assert world.optimizer.state is peek(world.optimizer)
        before = snapshot(world.optimizer)
        launched = len(capturing.launched)
        expected = "captured in.*CUDA graph" if captured_before else f"captured in a CUDA graph.*{message}"
        with context, capturing.captures(world.optimizer), pytest.raises(RuntimeError, match=expected):
            world.optimizer.step()
        assert snapshot(world.optimizer) == before
        assert len(capturing.launched) == launched
        assert not any(name == "update" for name, _ in capturing.launched[launched:])


@pytest.mark.parametrize("method", ["prepare", "empty", "staging", "upload"])
def test_a_capture_that_fails_changes_nothing(method, capturing, monkeypatch):
    """Nor does it leave behind a graph that nobody can run, for which steps would wait from then on."""
    with on("cpu"):
        wanted = Trainer(None, max_grad_norm=1.0).run("eea")
    for at in range(1, 100):
        with on("cuda"):
            found = Trainer(capturing, max_grad_norm=1.0)
            found.run("e")
            assert found.optimizer.state is peek(found.optimizer)
            before = snapshot(found.optimizer)
            calls = []
            original = getattr(capturing, method)

            def failing(*args, at=at, calls=calls, original=original):
                calls.append(1)
                if len(calls) == at:
                    raise MemoryError
                return original(*args)

            refused = False
            with monkeypatch.context() as patch, capturing.captures(found.optimizer):
                patch.setattr(capturing, method, failing)
                try:
                    found.optimizer.step()
                except MemoryError:
                    refused = True
            if not refused:
                break
            assert snapshot(found.optimizer) == before
            assert not found.optimizer._whole.plan.captured, f"call {at}"
            assert_same(settled(found.run("ea").optimizer), results(wanted.optimizer))
    assert at > 2


def test_a_first_step_is_not_captured(capturing):
    for make in (lambda optimizer: None, lambda optimizer: optimizer.init_state()):
        with on("cuda"):
            world = World()
            make(world.optimizer)
            world.set_gradients()
            before = snapshot(world.optimizer)
            with (
                capturing.captures(world.optimizer),
                pytest.raises(RuntimeError, match=r"captured in a CUDA graph.*take a step"),
            ):
                world.optimizer.step()
            assert snapshot(world.optimizer) == before
            assert_same(settled(world.run(2).optimizer), results(World().run(2).optimizer))


@pytest.mark.parametrize("read", [False, True], ids=["", "counts are read before"])
@pytest.mark.parametrize("graphs_before", [0, 1])
def test_a_graph_of_other_rows_is_refused_or_right(graphs_before, read, capturing):
    """The counts of all rows that a device decides are guessed together."""

    def trained(device):
        trainer = Trainer(device, shapes=((3,), (4,), (5,), (6,)), max_grad_norm=1.0).run("a" * graphs_before + "e")
        trainer.params[1].grad = None
        trainer.set_gradients()
        return trainer

    with on("cpu"):
        wanted = trained(None)
        wanted.take()
        wanted.take()
    with on("cuda"):
        found = trained(capturing)
        if read:
            assert found.optimizer.state is peek(found.optimizer)
        with capturing.captures(found.optimizer) as graph:
            no = refused(found.optimizer, found.take) if read else None
            if no is None:
                try:
                    found.take()
                except RuntimeError as error:
                    assert "CUDA graph" in str(error)  # noqa: PT017
                    no = True
        if graphs_before and no:
            return  # where steps at once are refused as well
        for _ in range(2):
            found.take() if no else replay(graph)
        assert_same(settled(found.optimizer), results(wanted.optimizer))
