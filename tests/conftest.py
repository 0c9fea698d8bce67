"""Settings of torch that a test changes are as they were for the next one; Triton's kernels are interpreted."""

import os
import signal

# Read when Triton is imported, here and in children: its kernels run on the CPU. tests/gpu has them compiled.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from launchers import device  # noqa: F401
from ranks import ranks  # noqa: F401

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job in the background, whose Ctrl-C is not meant for it
    signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = [] if torch.cuda.is_available() else ["gpu"]  # make test-gpu


@pytest.fixture(autouse=True)
def torch_settings():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(params=["cpu", "cuda", "reference"])
def engine_name(request):
    return request.param


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Let Triton's interpreter patch its language once for a launch, not for each call of a function in a kernel.

    And look up a type's numpy type once, not build a table of all for each value.
    """
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if module.startswith("triton") and module not in patched:  # a launch patches what kernels' own modules see
            patched.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    slow, numpy_types = interpreter._get_np_dtype, {}

    def numpy_type(kind):
        name = kind.scalar.name
        if name not in numpy_types:
            numpy_types[name] = slow(kind)
        return numpy_types[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(interpreter, "_get_np_dtype", numpy_type)
        yield
