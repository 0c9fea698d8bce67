"""Ctrl-C at any point that Python leaves for it."""

import signal
import sys


class Interrupts:
    """Ctrl-C at one of the points at which Python handles signals: calls, and returns from C, of these files.

    But within a kernel, which is Python only where it is interpreted.
    """

    KERNELS = ("cuda/kernels.py", "cuda/formats.py", "cuda/adamw.py")

    def __init__(self, at, files):
        self.left = at
        self.files = files
        self.where = None

    def __call__(self, frame, event, _):
        file = frame.f_code.co_filename
        if event not in ("call", "c_return") or self.files not in file or file.endswith(self.KERNELS):
            return
        self.left -= 1
        if self.left == 0:
            self.where = f"{file.rpartition('/')[2]}:{frame.f_lineno} ({event})"
            sys.setprofile(None)
            signal.getsignal(signal.SIGINT)(signal.SIGINT, frame)


def interrupted(call, at, files):
    """Call with Ctrl-C at one of these points; return which it was, or None if there are fewer."""
    interrupts = Interrupts(at, files)
    sys.setprofile(interrupts)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return interrupts.where
