"""Triton's interpreter, made to do the same in half the time: it makes far more types than numbers.

Nothing here changes what is computed. What is looked up or made again and again, by what does not change, is kept.
"""

import math

_quick = False


def quicken():
    """Replace the interpreter's slowest functions, in this process and for good."""
    global _quick
    if _quick:
        return
    _quick = True
    from triton.language import core, semantic
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        """Patch the language once for a launch, not for each call of a function in a kernel."""
        module = self.fn.__module__
        if module.startswith("triton") and module not in patched:  # a launch patches what kernels' own modules see
            patched.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    make_numpy_type, numpy_types = interpreter._get_np_dtype, {}

    def numpy_type(kind):
        """Keep each type's numpy type: the interpreter builds a table of all for each value."""
        name = kind.scalar.name
        if name not in numpy_types:
            numpy_types[name] = make_numpy_type(kind)
        return numpy_types[name]

    blocks = {}

    def with_element_type(self, scalar):
        """Keep the types of blocks; a scalar type's name says all about it."""
        key = scalar.name, *self.shape.values
        if key not in blocks:
            blocks[key] = core.block_type(scalar, self.shape)
        return blocks[key]

    def init_tensor(self, handle, type):
        """Make a shape once for a type, not for each tensor of it."""
        self.handle, self.type, self.dtype = handle, type, type.scalar
        if "_of_tensors" not in type.__dict__:
            shape = type.shape if type.is_block() else ()
            type._of_tensors = core.tuple([core.constexpr(size) for size in shape]), core.constexpr(math.prod(shape))
        self.shape, self.numel = type._of_tensors

    broadcast_any = semantic.TritonSemantic.broadcast_impl_value

    def broadcast(self, left, right):
        """Leave two blocks of one shape alone."""
        one, other = left.type, right.type
        if one.is_block() and other.is_block() and one.shape.values == other.shape.values:
            return left, right
        return broadcast_any(self, left, right)

    unwrap_any, plain = core._unwrap_if_constexpr, {int, float, bool, str, type(None), core.dtype, core.tensor}

    def unwrap(value):
        """Look for the usual kinds of values first."""
        kind = type(value)
        return value.value if kind is core.constexpr else value if kind in plain else unwrap_any(value)

    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = numpy_type
    core.block_type.with_element_ty = with_element_type
    core.tensor.__init__ = init_tensor
    semantic.TritonSemantic.broadcast_impl_value = broadcast
    core._unwrap_if_constexpr = unwrap
