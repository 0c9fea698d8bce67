"""Guards updates of state on the host beside backward: on a stream of their own, in an order that no stream can break.

There is no GPU here. Two streams are played: what is launched on that of backward runs at once, what is launched on
that of updates as late as events allow. So whoever does not wait computes with old weights.
"""

import contextlib
import gc
import math
import weakref

import pytest
import torch
from torch import nn

import lucid.optim as optim
from bits import assert_same, draw, on, peek, results
from launchers import Device
from lucid import engine
from lucid.engine.cuda import launch
from lucid.optim import overlap
from pinning import lies_in, pretend_pinned


class Stream:
    """A stream of the played device. ``log``: of all of them. ``late``: whether it runs nothing before it must."""

    def __init__(self, name, streams, late):
        self.name, self.streams, self.late = name, streams, late
        self.todo, self.done = [], 0  # what has not run; how many have

    def do(self, act):
        if self.late:
            self.todo.append(act)
        else:
            act()

    def run_until(self, place):
        while self.done < place:
            self.done += 1
            self.todo.pop(0)()

    def record_event(self):
        return self, self.done + len(self.todo)

    def wait_event(self, event):
        stream, place = event
        self.streams.log.append((self.name, "waits for", stream.name, place))
        self.do(lambda: stream.run_until(place))

    def wait_stream(self, stream):
        self.wait_event(stream.record_event())


class Played:
    """The streams of a device; those of backward are `main`, or another that is made current."""

    def __init__(self):
        self.log = []
        self.main, self.own = Stream("main", self, late=False), Stream("updates", self, late=True)
        self.now = self.main

    def current(self):
        return self.now

    @contextlib.contextmanager
    def within(self):
        before, self.now = self.now, self.own
        try:
            yield
        finally:
            self.now = before


class TwoStreams(Device):
    """A device that launches on the current stream of `Played`."""

    def __init__(self, played):
        self.played = played
        super().__init__()

    def stream(self):
        return 0 if self.played.now is self.played.main else 1

    def do(self, act):
        self.played.now.do(act)

    def launch(self, prepared, programs, args, kind):
        self.played.log.append((self.played.now.name, prepared.fn.__name__))
        super().launch(prepared, programs, args, kind)

    def event(self):
        return Event(self)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.last = self.device.played.now.record_event()

    def synchronize(self):
        stream, place = self.last
        stream.run_until(place)


@pytest.fixture
def played(monkeypatch):
    found = Played()
    pretend_pinned(monkeypatch)
    monkeypatch.setattr(overlap, "streams_for", lambda device: found)
    monkeypatch.setitem(launch._launchers, (1, 0), TwoStreams(found))
    tolist = torch.Tensor.tolist

    def waiting(tensor):
        found.now.run_until(found.now.done + len(found.now.todo))  # to read from a device waits for the current stream
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", waiting)
    with on("cuda"):
        yield found


def network(width=8):
    net = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(width, width), nn.Tanh())])
    for number, param in enumerate(net.parameters()):
        param.data = draw(number, param.shape)
    return net


def train(state_device, steps=4, around=lambda step, act: act(), **options):
    net = network()
    optimizer = optim.AdamW(net.parameters(), 0.05, state_device=state_device, **options)
    optimizer.step_in_backward()
    for step in range(steps):
        around(step, net(draw(step, (5, 8))).square().mean().backward)
    return net, optimizer


@pytest.mark.parametrize(
    "options", [{}, {"state_format": "bf16"}, {"nonfinite": "skip"}, {"nonfinite": "error"}], ids=str
)
def test_the_bits_of_updates_one_after_the_other(options, played):
    """Weights are read by the next forward, which nothing but the end of backward orders."""
    _, ours = train("cpu", **options)
    assert ("updates", "update") in played.log
    assert ("main", "update") not in played.log
    found = results(ours)
    played.log.clear()
    _, theirs = train(None, **options)
    assert {place for place, *_ in played.log} == {"main"}
    assert all(lies_in(engine.pinned.arena, entry) for entry in peek(ours).values())
    assert ours.state
    assert theirs.state
    assert_same(found, results(theirs))


def test_the_order_of_events(played):
    """Each update waits for the stream that made its gradient; at most the largest gradient's size is held; at the end
    of backward its stream waits for all.
    """
    train("cpu", steps=1)
    played.log.clear()
    net, optimizer = train("cpu", steps=1)
    sizes = [param.nbytes for param in reversed(list(net.parameters()))]  # 32 bytes of a bias, 256 of a matrix
    assert sorted(set(sizes)) == [32, 256]
    updates = [number for number, entry in enumerate(played.log) if entry == ("updates", "update")]
    assert len(updates) == 6
    before = 0
    for number in updates:
        own = played.log[before:number]
        assert ("updates", "waits for", "main", 0) in own  # what main has been given has run
        before = number + 1
    assert [entry[:3] for entry in played.log[before:]] == [("main", "waits for", "updates")] * 2
    assert played.own.todo == []
    assert optimizer.state


READ = {
    "skipped_steps": lambda optimizer: optimizer.skipped_steps,
    "statistics": lambda optimizer: str(optimizer.statistics()),
    "state": lambda optimizer: [entry["exp_avg"].clone() for entry in optimizer.state.values()],
}


@pytest.mark.parametrize("read", READ.values(), ids=READ.keys())
def test_who_reads_within_backward_waits_for_updates(read, played):
    runs = []
    for device in ("cpu", None):
        net, found = network(), []
        optimizer = optim.AdamW(net.parameters(), 0.05, state_device=device, nonfinite="skip")
        optimizer.observe()
        optimizer.step_in_backward()
        for step in range(4):
            hidden = net[:4](draw(step, (5, 8)))
            if step:
                hidden.register_hook(lambda _, optimizer=optimizer, found=found: found.append(read(optimizer)))
            if step == 2:
                net[4].weight.register_hook(lambda gradient: gradient * math.nan)
            net[4:](hidden).square().mean().backward()
        assert optimizer.state
        runs.append((str(found), optimizer.skipped_steps, results(optimizer)))
    assert len(found) == 3
    assert runs[0][:2] == runs[1][:2]
    assert_same(runs[0][2], runs[1][2])


def test_gradients_are_held_until_their_stream_waits(played, monkeypatch):
    alive, most = weakref.WeakSet(), []
    updating = overlap._Lane.updating

    def noted(lane, gradient):
        alive.add(gradient.untyped_storage())
        most.append(sum(held.gradient.nbytes for held in lane._held))
        return updating(lane, gradient)

    monkeypatch.setattr(overlap._Lane, "updating", noted)
    net, _ = train("cpu", steps=2)
    gc.collect()
    (lane,) = [found for found in gc.get_objects() if isinstance(found, overlap._Lane) and found._streams is played]
    assert most
    assert max(most) <= max(param.nbytes for param in net.parameters())
    assert not lane._held
    assert lane._bytes == 0
    assert not lane._ends


def test_small_gradients_do_not_wait_for_each_other(played):
    """Those of the same size as the largest together are held at once."""
    params = [nn.Parameter(draw(number, (16,))) for number in range(8)] + [nn.Parameter(draw(9, (128,)))]
    optimizer = optim.AdamW(params, state_device="cpu")
    optimizer.step_in_backward()
    for _ in range(2):
        played.log.clear()
        sum(param.sum() for param in params).backward()
    assert [entry[:3] for entry in played.log].count(("main", "waits for", "updates")) <= 3 + 8  # the end lets go all


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("in backward")


def test_a_backward_that_fails_is_waited_for(played):
    """The next forward may follow without any call of the optimizer's."""
    runs = []
    for device in ("cpu", None):
        net = network()
        optimizer = optim.AdamW(net.parameters(), 0.05, state_device=device)
        optimizer.step_in_backward()
        net(draw(0, (5, 8))).square().mean().backward()
        x = draw(1, (5, 8)).requires_grad_()
        with pytest.raises(RuntimeError, match="in backward"):
            net(Fails.apply(x)).square().mean().backward()
        gc.collect()
        runs.append([param.detach().clone() for param in net.parameters()])
    for ours, theirs in zip(*runs, strict=True):
        assert torch.equal(ours, theirs)


def test_reentrant_checkpoints(played):
    """Each segment is a backward of its own."""
    from torch.utils.checkpoint import checkpoint

    runs = []
    for device in ("cpu", None):
        net = network()
        optimizer = optim.AdamW(net.parameters(), 0.05, state_device=device)
        optimizer.step_in_backward()
        for step in range(3):
            x = draw(step, (5, 8)).requires_grad_()
            for part in net:
                x = checkpoint(part, x, use_reentrant=True)
            x.square().mean().backward()
        runs.append(results(optimizer))
    assert_same(*runs)


def test_an_update_that_raises(played):
    net = network()
    optimizer = optim.AdamW(net.parameters(), 0.05, state_device="cpu", nonfinite="error")
    optimizer.step_in_backward()
    net(draw(0, (5, 8))).square().mean().backward()
    with pytest.raises(FloatingPointError):
        net(torch.full((5, 8), math.nan)).square().mean().backward()
    optimizer.zero_grad()
    net(draw(1, (5, 8))).square().mean().backward()
    assert played.own.todo == []


def test_where_nothing_overlaps(played, monkeypatch):
    """Outside of backward, in a capture, with state on the device or staged, on a device without streams."""
    net = network()
    optimizer = optim.AdamW(net.parameters(), 0.05, state_device="cpu")
    optimizer.step_in_backward()
    net(draw(0, (5, 8))).square().mean().backward()
    played.log.clear()

    def backward():
        net(draw(1, (5, 8))).square().mean().backward()
        assert {place for place, *_ in played.log} == {"main"}
        played.log.clear()

    with optimizer.accumulate():
        net(draw(1, (5, 8))).square().mean().backward()
    for param in net.parameters():
        optimizer._step_alone(param)
    assert {place for place, *_ in played.log} == {"main"}
    played.log.clear()
    with monkeypatch.context() as patch:
        patch.setattr(overlap, "streams_for", lambda device: None)
        optimizer._stepper.overlap = overlap.Overlap()
        backward()
    assert overlap.streams_for is not None
    with optimizer.accumulate():
        net(draw(1, (5, 8))).square().mean().backward()
    optimizer.step()
    assert {place for place, *_ in played.log} == {"main"}


def test_a_cpu_has_no_streams():
    assert overlap.streams_for(torch.device("cpu")) is None
