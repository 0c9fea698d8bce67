"""Guards that a step on a device happens whole or not at all, whatever fails before its launches or interrupts them.

Everything that may fail is made to fail, in every situation, and signals come between launches and anywhere else. Then
parameters, state and counts are compared to the bit with an engine that keeps no tables, and training goes on.
"""

import signal
import sys
import threading

import pytest

from bits import World, assert_same, on, peek, results, snapshot
from launchers import Device, settled, twin_of
from lucid.engine.cuda import device_tables, launch

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


def now_elsewhere(world):
    world.params[0].data = world.params[0].data.clone()


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
    "new rows": ({"max_grad_norm": 1.0}, 2, now_elsewhere),
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
    monkeypatch.setattr(device_tables, "_ROOM", 1)

    def run(world):
        world.run(warm)
        change(world)
        return world

    wanted = twin_of(lambda: run(two_kinds(**options)).run(1))
    with on("cuda"):
        for at in range(1, 100):
            calm = Failing(method, 0)
            monkeypatch.setitem(launch._launchers, (1, 0), calm)
            device_tables._powers.cache_clear()
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
    device_tables._powers.cache_clear()


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


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_an_interrupt_anywhere_leaves_no_step_half_taken(options, device):
    """A signal, which its handler may put off; test_atomic_interrupted.py has exceptions at every point."""
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
    assert world.done > 6
    assert not wrong, "\n".join(dict.fromkeys(wrong))
