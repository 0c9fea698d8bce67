"""What FSDP2 shards of a model, what it has gathered, and when it has reduced the whole gradient of a parameter."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from lucid.engine.values import shown

_Handles = dict[Any, RemovableHandle]  # by module: of its next forward; by FSDPParam: of the gathered parameter


class Sharded:
    """The parameters of a model that FSDP2 shards, and those of them whose gradients are complete.

    FSDP2 calls the hooks of a parameter when it has reduced the gradient. This need not be the whole gradient: if
    earlier micro-batches were not reduced (`set_requires_gradient_sync(False)`) and a module is applied several times,
    FSDP2 reduces what it has at the module's first backward, and the rest later. So another hook, on the gathered
    parameter, notes that autograd has completed a gradient that FSDP2 reduces next.

    ``optimized``: the optimizer's parameters, of which `params` must contain some.
    """

    def __init__(self, model: nn.Module | None = None, optimized: Iterable[Tensor] = ()) -> None:
        self._complete: set[Tensor] = set()
        self._handles: _Handles = {}
        self._modules = [] if model is None else _modules_of(model, _HOOKS_NEED)
        weakref.finalize(self, _remove, self._handles).atexit = False
        self.params = {each.sharded_param for module in self._modules for _, each in _params_of(module)}
        if self.params and self.params.isdisjoint(optimized):
            raise ValueError(
                "model: FSDP2 shards its parameters, and the optimizer has none of them; create the optimizer after "
                "fully_shard() and before the first forward"
            )
        for module in self._modules:
            self._handles[module] = module.register_forward_pre_hook(_following(self._complete, self._handles))
        self.follow()

    def follow(self) -> None:
        """Add hooks to gathered parameters that are new or unfrozen."""
        for module in self._modules:
            _follow(module, self._complete, self._handles)

    def remove(self) -> None:
        """Remove the hooks."""
        _remove(self._handles)

    def completes(self, param: Tensor) -> bool:
        """Whether this call of a parameter's hook brings the whole gradient.

        If a loss uses the shards themselves, autograd calls the hook as well, and FSDP2 adds its part later.
        """
        if type(torch._C._current_autograd_node()).__name__ == "AccumulateGrad" or param not in self._complete:
            return False
        self._complete.discard(param)
        return True


class Gathered:
    """What FSDP2 has gathered of the parameters that it shards: copies, which do not follow when shards are written."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self._modules = [] if model is None else _modules_of(model, "averages of sharded parameters need")

    def free(self) -> None:
        """Free all copies, so the next forward gathers again, after what has been written by then.

        `FSDPModule.reshard` keeps them if a forward has raised, and keeps what was gathered ahead.
        """
        for module in self._modules:
            module.set_post_optim_event(None)
            for group in module._get_fsdp_state()._fsdp_param_groups:
                group._all_gather_result = None
                group._to_sharded()


_HOOKS_NEED = (
    "with CPUOffloadPolicy, FSDP2 of older versions calls hooks before the gradient has arrived in host memory, so "
    "step_in_backward(model=...) needs"
)


def _modules_of(model: nn.Module, needs: str) -> list[Any]:
    """Return the modules of a model that FSDP2 shards; raise if torch is too old. ``needs``: what needs a newer one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {shown(model)}")
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    found = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if found and torch.__version__ < "2.13":
        raise RuntimeError(f"model: {needs} torch 2.13 or newer, got {torch.__version__}")
    return found


def _params_of(module: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (FSDPParamGroup, FSDPParam) for each parameter that FSDP2 shards with a module."""
    for group in module._get_fsdp_state()._fsdp_param_groups:
        for each in group.fsdp_params:
            yield group, each


def _follow(module: Any, complete: set[Tensor], handles: _Handles) -> None:
    for group, each in _params_of(module):
        gathered = getattr(each, "_unsharded_param", None)
        if gathered is not None and gathered.requires_grad and each not in handles:
            handles[each] = gathered.register_post_accumulate_grad_hook(_noting(group, each, complete))


def _following(complete: set[Tensor], handles: _Handles) -> Any:
    @_disable_dynamo
    def hook(module: nn.Module, _: Any) -> None:
        """Follow the gathered parameters of a module, which exist from its first forward on."""
        handles.pop(module).remove()
        _follow(module, complete, handles)

    return hook


def _noting(group: Any, each: Any, complete: set[Tensor]) -> Any:
    def hook(_: Tensor) -> None:
        if group.reduce_grads:
            complete.add(each.sharded_param)
        else:
            complete.discard(each.sharded_param)

    return hook


def _remove(handles: _Handles) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()
