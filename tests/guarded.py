"""The CPU's memory as that of a device, which no code of the host may read: a process that tries ends."""

import contextlib
import ctypes
import mmap

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from launchers import Device
from lucid.engine.cuda import launch


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
