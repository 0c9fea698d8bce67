"""Steps captured in a CUDA graph where no GPU is: what a graph would do is put off, and then done at each replay."""

import contextlib
import math

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from bits import peek
from launchers import Device
from lucid import engine
from lucid.engine.cuda import device_tables, launch


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
    device_tables._powers.cache_clear()


def replay(graph):
    for act in graph:
        act()
