"""Guards the step among other threads, processes, hooks and floating-point modes.

Several optimizers may step at once and in threads that autograd hooks run on, other Python threads go on while a
large step runs, a forked child can step though its parent used threads, and flush-denormal mode neither changes a
bit nor is lost. Nothing here is timed: what must not hang runs in a child that is killed and shows its stack.
"""

import copy
import sys
import threading
import time

import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import SEALED, World, assert_same, in_child, is_sealed, on, peek, results
from lucid import engine

pytestmark = pytest.mark.serial  # threads want cores of their own, and torch's own number of them

LARGE = [(700_001,), (3,), (200_000, 2)]  # above the size at which the interpreter's lock is let go


@pytest.fixture
def hasty_switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def run_together(acts):
    """Run all at once on threads of their own; raise what the first of them raised."""
    errors = []
    gate = threading.Barrier(len(acts))

    def guarded(act):
        try:
            gate.wait()
            act()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(act,), daemon=True) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


# Threads


@pytest.mark.usefixtures("hasty_switching")
@pytest.mark.parametrize("shapes", [World.SHAPES, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("count", [2, 8])
def test_optimizers_in_threads_of_their_own(count, shapes):
    steps = 40 if shapes is World.SHAPES else 3
    worlds = [World(shapes=shapes, lr=0.01 * (k + 1)) for k in range(count)]
    for k, world in enumerate(worlds):
        world.done = 1000 * k
    torch.set_num_threads(2)
    with engine.cpu.forced_batch_elements(5000):
        run_together([lambda world=world: world.run(steps) for world in worlds])
    for k, world in enumerate(worlds):
        alone = World(shapes=shapes, lr=0.01 * (k + 1))
        alone.done = 1000 * k
        torch.set_num_threads(1)
        assert_same(results(world.optimizer), results(alone.run(steps).optimizer), f"thread {k}")


@pytest.mark.usefixtures("hasty_switching")
@pytest.mark.parametrize("shapes", [World.SHAPES, LARGE], ids=["small", "large"])
def test_one_optimizer_from_two_threads(shapes):
    """Steps come one after the other: as many as were made, each whole."""
    steps = 30 if shapes is World.SHAPES else 4
    world = World(shapes=shapes)
    world.set_gradients()

    def act():
        for _ in range(steps):
            world.optimizer.step()

    run_together([act, act])
    twin = World(shapes=shapes)
    twin.set_gradients()
    for _ in range(2 * steps):
        twin.optimizer.step()
    assert_same(results(world.optimizer), results(twin.optimizer))


@pytest.mark.usefixtures("hasty_switching")
def test_state_may_be_read_while_another_thread_steps():
    """A checkpoint or a logger on a thread of its own."""
    world = World().run(SEALED)
    stop = threading.Event()
    seen = []

    def step():
        try:
            for _ in range(200):
                world.run(SEALED)
        finally:
            stop.set()

    def read():
        while not stop.wait(0.0002):
            seen.append(len(world.optimizer.state_dict()["state"]))

    run_together([step, read])
    assert set(seen) == {4}
    with on("reference"):
        wanted = results(World().run(world.done).optimizer)
    assert_same(results(world.optimizer), wanted)


def test_state_that_is_read_in_the_middle_of_a_step(monkeypatch):
    """The same without chance: at the moment between the look at the state and the first write."""
    world = World().run(SEALED)
    assert is_sealed(world.optimizer)
    original = engine.Scalars.of
    read = []

    def reading(*numbers):
        thread = threading.Thread(target=lambda: read.append(dict(world.optimizer.state)))
        thread.start()
        thread.join()
        return original(*numbers)

    monkeypatch.setattr(engine.Scalars, "of", staticmethod(reading))
    world.run(1)
    monkeypatch.undo()
    world.run(1)
    assert read
    with on("reference"):
        wanted = results(World().run(SEALED + 2).optimizer)
    assert_same(results(world.optimizer), wanted)


@pytest.mark.parametrize("warm", [0, SEALED])
def test_state_that_is_replaced_in_the_middle_of_a_step(warm, monkeypatch):
    """The step ends on the state that it began with; the next one is of the other, at its own addresses."""

    def copied(params):
        return {
            param: copy.deepcopy(peek(world.optimizer)[own]) for param, own in zip(params, world.params, strict=True)
        }

    world, twin = World().run(2), World().run(3 + warm)
    world.optimizer.state = copied(world.params)
    world.run(warm)
    assert is_sealed(world.optimizer) == (warm == SEALED)
    replacing, twin.optimizer.state = copied(world.params), copied(twin.params)
    twin.run(3)
    original = engine.Scalars.of

    def of(*numbers):
        if replacing:
            given = dict(replacing)
            replacing.clear()
            thread = threading.Thread(target=lambda: setattr(world.optimizer, "state", given))
            thread.start()
            thread.join()
        return original(*numbers)

    def act():
        monkeypatch.setattr(engine.Scalars, "of", staticmethod(of))
        assert_same(results(world.run(4).optimizer), results(twin.optimizer))

    in_child(act)


@pytest.mark.parametrize("change", ["entries", "tensors"])
def test_a_first_step_of_a_state_that_another_thread_changes_in_its_middle(change, monkeypatch):
    """The tensors that it was checked with are gone after it: the next one must not take their addresses."""
    world = World().run(2)

    def copied():
        return {param: copy.deepcopy(peek(world.optimizer)[param]) for param in world.params}

    world.optimizer.state = copied()
    given, twin = copied(), World().run(3)
    twin.optimizer.state = {p: copy.deepcopy(given[own]) for p, own in zip(twin.params, world.params, strict=True)}
    twin.run(3)
    original = engine.Scalars.of

    def give():
        for param, entry in given.items():
            if change == "entries":
                world.optimizer.state[param] = entry
            else:
                world.optimizer.state[param].update(entry)
        given.clear()

    def of(*numbers):
        thread = threading.Thread(target=give)
        thread.start()
        thread.join()
        return original(*numbers)

    def act():
        with monkeypatch.context() as patch:
            patch.setattr(engine.Scalars, "of", staticmethod(of))
            world.run(1)
        assert_same(results(world.run(3).optimizer), results(twin.optimizer))

    in_child(act)


def test_other_python_threads_go_on_during_a_large_step(monkeypatch):
    """Another thread counts while the engine runs, which it can only where the interpreter's lock is let go.

    Nobody is asked to hand the lock over meanwhile, so the thread that counts has it only while it is free.
    """
    optimizer = optim.AdamW([param := Parameter(torch.ones(1 << 20))])
    param.grad = torch.ones(1 << 20)
    optimizer.step()
    counts = [0]
    stop = threading.Event()

    def count():
        while not stop.is_set():
            counts[0] += 1
            time.sleep(0)  # lets the lock go

    def counted(act):
        before = counts[0]
        act()
        return counts[0] - before

    inside = []
    write = engine.Plan._write

    def counting(plan, **options):
        inside.append(counted(lambda: write(plan, **options)))

    monkeypatch.setattr(engine.Plan, "_write", counting)
    torch.set_num_threads(1)
    interval = sys.getswitchinterval()
    counter = threading.Thread(target=count, daemon=True)
    sys.setswitchinterval(100)
    try:
        counter.start()
        time.sleep(0.01)
        with engine.cpu.forced_batch_elements(1):
            for _ in range(8):
                optimizer.step()
        held = counted(lambda: sum(range(1_000_000)))
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        counter.join()
    assert max(inside) > 0
    assert held == 0


# Hooks


@pytest.mark.parametrize("threads", [1, 2])
def test_steps_in_backward(threads):
    """One optimizer a parameter, each stepping and freeing its gradient as soon as it is there."""

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(9, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))

    def train(net, step, count=SEALED + 3):
        for k in range(count):
            net(torch.randn(5, 9, generator=torch.Generator().manual_seed(k))).square().mean().backward()
            step()

    torch.set_num_threads(threads)
    plain = model()
    optimizer = optim.AdamW(plain.parameters(), lr=0.01)

    def step_and_clear():
        optimizer.step()
        optimizer.zero_grad()

    train(plain, step_and_clear)

    hooked = model()
    optimizers = {p: optim.AdamW([p], lr=0.01) for p in hooked.parameters()}

    def in_backward(param):
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in hooked.parameters():
        param.register_post_accumulate_grad_hook(in_backward)
    train(hooked, lambda: None)
    for ours, theirs in zip(hooked.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.grad is None


@pytest.mark.usefixtures("hasty_switching")
def test_backward_on_several_threads_with_steps_in_it():
    torch.manual_seed(0)
    start = torch.nn.Linear(30, 30)

    def train(k, found):
        net = copy.deepcopy(start)
        optimizers = {p: optim.AdamW([p], lr=0.01) for p in net.parameters()}
        for param in net.parameters():
            param.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
        for step in range(20):
            x = torch.randn(5, 30, generator=torch.Generator().manual_seed(100 * k + step))
            net.zero_grad()
            net(x).square().mean().backward()
        found[k] = [p.detach() for p in net.parameters()]

    alone, together = {}, {}
    for k in range(4):
        train(k, alone)
    run_together([lambda k=k: train(k, together) for k in range(4)])
    for k in range(4):
        assert all(map(torch.equal, alone[k], together[k]))


def test_hooks_of_the_step_may_step():
    """A hook of the step may step another optimizer, and this one again after it is done."""
    first, second = World(), World()
    again = []

    def post(*_):
        second.run(1)
        if not again:
            again.append(1)
            first.run(1)

    first.optimizer.register_step_post_hook(post)
    first.set_gradients()
    first.optimizer.step()
    assert {int(e["step"]) for e in first.optimizer.state.values()} == {2}
    assert {int(e["step"]) for e in second.optimizer.state.values()} == {2}


# Fork


@pytest.mark.parametrize("child_threads", [1, 2])
@pytest.mark.parametrize("parent_threads", [None, 1, 2], ids=["no step before", "1 thread before", "2 threads before"])
def test_a_forked_child_steps(parent_threads, child_threads):
    torch.set_num_threads(1)  # torch's own threads do not survive a fork
    gradients = World(shapes=LARGE)
    gradients.set_gradients()

    def world():
        made = World(shapes=LARGE)
        for param, source in zip(made.params, gradients.params, strict=True):
            param.grad = source.grad
        return made

    wanted = world()
    for _ in range(5):
        wanted.optimizer.step()
    wanted = results(wanted.optimizer)
    ours = world()
    if parent_threads is not None:
        torch.set_num_threads(parent_threads)
        ours.optimizer.step()
        ours.optimizer.step()

    def act():
        torch.set_num_threads(child_threads)
        for _ in range(3 if parent_threads is not None else 5):
            ours.optimizer.step()
        torch.set_num_threads(1)
        assert_same(results(ours.optimizer), wanted)

    for _ in range(2):
        in_child(act)
    if parent_threads is not None:  # and the parent goes on
        for _ in range(3):
            ours.optimizer.step()
        assert_same(results(ours.optimizer), wanted)


def test_a_fork_while_another_thread_steps():
    """The child finds the parent's workers gone and perhaps the pool's lock taken."""
    torch.set_num_threads(2)
    busy = World(shapes=LARGE)
    busy.set_gradients()
    idle = World(shapes=LARGE)
    idle.set_gradients()
    idle.optimizer.step()
    stop = threading.Event()

    def keep_stepping():
        while not stop.is_set():
            busy.optimizer.step()

    def act():
        for _ in range(3):
            idle.optimizer.step()

    thread = threading.Thread(target=keep_stepping)
    thread.start()
    try:
        for _ in range(6):
            in_child(act, seconds=30)
    finally:
        stop.set()
        thread.join()


def test_a_child_of_a_child_steps():
    torch.set_num_threads(2)
    world = World(shapes=LARGE)
    world.set_gradients()
    world.optimizer.step()

    def inner():
        world.optimizer.step()

    def outer():
        world.optimizer.step()
        in_child(inner, seconds=20)
        world.optimizer.step()

    in_child(outer)


# Floating-point mode


TINY = torch.finfo(torch.float32).tiny


def flushes():
    """Whether this thread's arithmetic loses subnormal numbers."""
    return bool((torch.tensor([TINY]) * 0.5 == 0).item())


def subnormal_world(shapes):
    """Parameters are subnormal, and so are the first moments of half of them and the second of the others."""
    world = World(shapes=shapes)

    def set_gradients():
        World.set_gradients(world)
        for param in world.params:
            scale = torch.tensor([2e-40, 1e-20], dtype=torch.float64).repeat(param.numel())[: param.numel()]
            param.grad = (param.grad.double() * scale.view(param.shape)).float()

    for param in world.params:
        param.data = (param.data.double() * 1e-39).float()
    world.optimizer.param_groups[0].update(lr=1e-38, eps=1e-41)
    world.optimizer.param_groups[1].update(lr=1e-40, eps=1e-30)
    world.set_gradients = set_gradients
    return world


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shapes", [((9,), (2, 3)), ((300_001,), (301, 1000))], ids=["small", "large"])
@pytest.mark.parametrize("level", engine.cpu.simd_levels())
def test_flush_denormal_mode_changes_no_bit_and_stays(level, shapes, threads):
    steps = 4 if shapes[0] == (9,) else 2
    with on("reference"):
        reference = subnormal_world(shapes)
        gradients = []
        for _ in range(steps):
            reference.set_gradients()
            gradients.append([param.grad for param in reference.params])
            reference.optimizer.step()
            reference.done += 1
    wanted = results(reference.optimizer)
    held = {key: sum(int(((r[key] != 0) & (r[key].abs() < TINY)).sum()) for r in wanted) > 0 for key in wanted[0]}
    assert held["param"]
    assert held["exp_avg"]
    assert held["exp_avg_sq"]

    world = subnormal_world(shapes)
    torch.set_num_threads(threads)
    with engine.cpu.forced_simd_level(level), engine.cpu.forced_batch_elements(1000):
        try:
            assert torch.set_flush_denormal(True)
            assert flushes()
            for of_step in gradients:
                for param, gradient in zip(world.params, of_step, strict=True):
                    param.grad = gradient
                world.optimizer.step()
                assert flushes()
        finally:
            torch.set_flush_denormal(False)
        assert not flushes()
    assert_same(results(world.optimizer), wanted)


def test_the_mode_is_kept_when_a_step_fails():
    world = World().run(2)
    try:
        torch.set_flush_denormal(True)
        world.set_gradients()
        world.params[-1].grad = world.params[-1].grad.to_sparse()
        with pytest.raises(TypeError):
            world.optimizer.step()
        assert flushes()
    finally:
        torch.set_flush_denormal(False)
    world.run(1)
    assert not flushes()


@pytest.mark.parametrize("kind", ["negative", "conjugate", "float64", "strided"])
def test_gradients_that_are_prepared_keep_their_subnormals(kind):
    """What Python makes ready for the engine, before the engine sets its mode, must not flush."""
    dtype = torch.complex64 if kind == "conjugate" else torch.float32
    values = (torch.randn(40, generator=torch.Generator().manual_seed(0)).double() * 1e-40).float()
    if kind == "conjugate":
        values = torch.complex(values, values.flip(0))

    def run(flush):
        param = Parameter(torch.zeros(40, dtype=dtype))
        optimizer = optim.AdamW([param], betas=(0.5, 0.5))
        param.grad_dtype = None
        if kind == "negative":
            gradient = torch.complex(values, -values).conj().imag
        elif kind == "conjugate":
            gradient = values.conj()
        elif kind == "float64":
            gradient = values.double()
        else:
            gradient = torch.stack([values, values], 1)[:, 0]
        param.grad = gradient
        try:
            torch.set_flush_denormal(flush)
            optimizer.step()
            optimizer.step()
        finally:
            torch.set_flush_denormal(False)
        return results(optimizer)

    wanted = run(flush=False)
    assert wanted[0]["exp_avg"].abs().max() > 0
    assert_same(run(flush=True), wanted)


# Version counters


@pytest.mark.parametrize("warm", [0, 1, SEALED])
def test_a_stale_saved_tensor_is_an_error(warm, engine_name):
    with on(engine_name):
        world = World().run(warm)
        world.set_gradients()
        loss = (world.params[0] * world.params[0]).sum()
        before = [param._version for param in world.params]
        world.optimizer.step()
        assert all(param._version > old for param, old in zip(world.params, before, strict=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("warm", [0, 1, SEALED])
def test_a_parameter_that_was_not_updated_keeps_its_version(warm, engine_name):
    with on(engine_name):
        world = World().run(warm)
        world.set_gradients()
        world.params[0].grad = None
        loss = (world.params[0] * world.params[0]).sum()
        before = world.params[0]._version
        world.optimizer.step()
        assert world.params[0]._version == before
        loss.backward()


def test_views_of_a_parameter_see_its_version(engine_name):
    with on(engine_name):
        world = World().run(2)
        view = world.params[0].detach()
        before = view._version
        world.run(1)
        assert view._version > before
        assert torch.equal(view, world.params[0])
