"""The CPU's memory as a CUDA device that notes what it is asked to do, for tests of the CUDA engine where no GPU is.

Triton's interpreter works on addresses, so that the CPU's memory can stand for a device's. The fixture `device` puts a
`Device` in the place of the launcher of a first GPU.
"""

import pytest

from bits import on, peek, results
from lucid.engine.cuda import device_tables, launch

OPTIONS = {
    "plain": {},
    "clipped": {"max_grad_norm": 1.0},
    "skip": {"nonfinite": "skip"},
    "error": {"nonfinite": "error"},
}


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


@pytest.fixture
def device(monkeypatch):
    found = Device()
    monkeypatch.setitem(launch._launchers, (1, 0), found)
    yield found
    device_tables._powers.cache_clear()


def device_plan(optimizer):
    return optimizer._stepper.whole.plan._cuda


def twin_of(make, steps=0):
    """The same on the CPU engine."""
    with on("cpu"):
        return make().run(steps)


def settled(optimizer):
    """What training gives, step counts included where the device has them."""
    assert optimizer.state is peek(optimizer)
    return results(optimizer)
