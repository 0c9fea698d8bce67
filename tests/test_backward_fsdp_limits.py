"""Guards the step in backward under FSDP2 where it fails, is refused, or is left to `step()`; and its memory.

No process may wait for ever for one that fails: every case here ends on every process, with an error where one belongs.
"""

import math
import re
import weakref
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import lucid.optim as optim
import train_gpt
from bits import assert_same, on, peek
from fsdp import Net, adamw, grads, sharded, shards, stepping, train
from launchers import Device
from lucid import engine
from test_device_ranks import device
from twins import steps_of

# A process that fails


@contextmanager
def fails(rank_that_fails, error, match):
    """The block raises that on this process if it is this one, and on others that another process has failed."""
    if distributed.get_rank() != rank_that_fails:
        error, match = RuntimeError, "another process could not"
    with pytest.raises(error, match=match) as raised:
        yield raised


def bad_state(nonfinite, observing):
    """Rank 1 cannot update one parameter in backward: the rest of backward goes on, and all processes raise in step."""
    net, optimizer = stepping(nonfinite=nonfinite)
    optimizer.observe(observing)
    train(net, optimizer, 0, 3)
    bad, fails_here = net.layers[1].weight, distributed.get_rank() == 1
    kept = peek(optimizer)[bad]["exp_avg"]
    if fails_here:
        optimizer.state[bad]["exp_avg"] = torch.zeros(3)
    net.loss(3).backward()
    distributed.all_reduce(net.outside.grad)
    assert [steps_of(optimizer, param) for param in net.layers.parameters() if param is not bad] == [4, 0, 4, 4, 4]
    assert steps_of(optimizer, net.embedding.weight, net.norm.bias, net.rare.bias) == [4, 4, 2]
    assert steps_of(optimizer, bad) == 4 - fails_here
    assert grads(net) == ["outside"] + ["layers.1.weight"] * fails_here
    with fails(1, ValueError, "exp_avg") as raised:
        optimizer.step()
    assert "load a checkpoint before you continue" in str(raised.value) + "".join(
        getattr(raised.value, "__notes__", [])
    )
    assert steps_of(optimizer, net.outside) == 3
    if fails_here:
        optimizer.state[bad]["exp_avg"] = kept
    optimizer.step()  # with the gradients that are left
    assert steps_of(optimizer, bad, net.outside) == [4, 4]
    assert grads(net) == []
    train(net, optimizer, 4, 6)
    return shards(optimizer)


def each_bad_state():
    expected = adamw(net := sharded(Net()))
    train(net, expected, 0, 6)
    for nonfinite, observing in (("propagate", False), ("error", True)):
        assert_same(bad_state(nonfinite, observing), shards(expected), nonfinite)


@pytest.mark.parametrize("world", [2, 3])
def test_a_process_that_cannot_update_a_parameter(ranks, world):
    ranks.run(world, each_bad_state)


def captured():
    """Neither hooks nor step() launch anything, and no words are exchanged."""
    with device(Device()) as asked, on("cuda"):
        net, optimizer = stepping()
        train(net, optimizer, 0, 2)
        asked.forget()
        with mock.patch.object(engine.cuda, "is_capturing", return_value=True):
            net.loss(2).backward()
            net.outside.grad = None
            with mock.patch.object(distributed, "all_reduce") as reduce:
                with pytest.raises(RuntimeError, match="captured in a CUDA graph"):
                    optimizer.step()
                assert not reduce.called
        assert not asked.launched
        net.zero_grad()
        train(net, optimizer, 2, 3)
        assert steps_of(optimizer, net.embedding.weight) == 3


def test_captured_steps_are_refused(ranks):
    ranks.run(2, captured)


def sharded_without_gradients():
    """A captured step of shards is refused even where this process has nothing to update."""
    with device(Device()), on("cuda"):
        net = sharded(Net())
        optimizer = adamw(net, max_grad_norm=1.0)
        train(net, optimizer, 0, 2)
        with (
            mock.patch.object(engine.cuda, "is_capturing", return_value=True),
            mock.patch.object(distributed, "all_reduce") as reduce,
            pytest.raises(RuntimeError, match="not sharded"),
        ):
            optimizer.step()
        assert not reduce.called


def test_captured_steps_of_shards_without_gradients_are_refused(ranks):
    ranks.run(2, sharded_without_gradients)


def fails_in_step():
    net, optimizer = stepping()
    train(net, optimizer, 0, 2)
    net.loss(2).backward()
    if distributed.get_rank() == 0:
        optimizer.state[net.outside]["step"] = torch.tensor(0.5)
    with fails(0, ValueError, "state 'step' of parameter 'outside'"):
        optimizer.step()


def test_a_process_that_fails_in_step(ranks):
    ranks.run(2, fails_in_step)


# Non-finite gradients


def poisoned(param, rank, value, at):
    """Make an entry of the gradient of one shard this value, in the `at`-th backward from now."""
    calls = []

    def hook(param):
        calls.append(1)
        if len(calls) == at and distributed.get_rank() == rank:
            param.grad.to_local().view(-1)[-1] = value

    return param.register_post_accumulate_grad_hook(hook)


def raises():
    """With "error", the process with the bad shard does not update it, and all processes raise in step."""
    net = sharded(Net())
    bad = net.layers[1].weight
    poisoned(bad, 1, math.nan, at=3)
    optimizer = adamw(net, nonfinite="error")
    optimizer.step_in_backward(model=net)
    train(net, optimizer, 0, 2)
    net.loss(2).backward()
    assert steps_of(optimizer, bad, net.layers[1].bias) == [3 - (distributed.get_rank() == 1), 3]
    with fails(1, FloatingPointError, r"layers.1.weight' has 1 NaN of \d+ entries, so it was not updated"):
        optimizer.step()


def exchanges():
    """Hooks exchange nothing, and step does so once."""
    net, optimizer = stepping(nonfinite="error")
    optimizer.observe()
    train(net, optimizer, 0, 2)
    count = []

    def counted(collective):
        def call(*arguments, **options):
            count.append(collective.__name__)
            return collective(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather"):
            patch.setattr(distributed, name, counted(getattr(distributed, name)))
        net.loss(2).backward()
        assert not count
        optimizer.step()
    assert count == ["all_reduce", "all_reduce", "all_gather"]  # errors of backward, the step's gradients, statistics


def test_nonfinite_gradients(ranks):
    for act in (raises, exchanges):
        ranks.run(2, act)


# What is refused


def refused():
    net, optimizer = stepping()
    with pytest.raises(ValueError, match="max_grad_norm=1 does not work in backward"):
        optimizer.max_grad_norm = 1.0
    with pytest.raises(ValueError, match='nonfinite="skip" does not work in backward under FSDP2'):
        optimizer.nonfinite = "skip"
    optimizer.step_in_backward(False)
    optimizer.nonfinite = "skip"
    with pytest.raises(ValueError, match='nonfinite="skip" does not work in backward under FSDP2'):
        optimizer.step_in_backward(model=net)
    assert optimizer._stepper.backward is None
    optimizer.nonfinite = "error"
    optimizer.step_in_backward(model=net)
    with pytest.raises(RuntimeError, match="step_in_backward"):
        optimizer.step(lambda: net.loss(0))
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got "):
        optimizer.step_in_backward(model=net.parameters())
    net.loss(0)
    gathered = [param for param in net.parameters() if not isinstance(param, DTensor)]
    plain = Net()
    early = optim.AdamW(plain.parameters())
    for late in (optim.AdamW(gathered), early):
        with pytest.raises(ValueError, match="the optimizer has none of them; create the optimizer after fully_shard"):
            late.step_in_backward(model=net)
        assert late._stepper.backward is None
    version, torch.__version__ = torch.__version__, torch.torch_version.TorchVersion("2.12.1")
    try:
        with pytest.raises(RuntimeError, match=re.escape("step_in_backward(model=...) needs torch 2.13")):
            optimizer.step_in_backward(model=net)
    finally:
        torch.__version__ = version
    train(net, optimizer, 0, 2)  # still on
    early.step_in_backward(model=plain)  # not sharded: as without a model
    with pytest.warns(RuntimeWarning, match=re.escape("call step_in_backward(model=model)")):
        plain.loss(0).backward()
    assert len(grads(plain)) > 6


def test_what_is_refused(ranks):
    ranks.run(2, refused)


# Memory


class Alive:
    """The bytes of sharded gradients that are alive, and the most."""

    def __init__(self):
        self.now = self.most = 0
        self._seen = set()

    def note(self, param):
        storage = param.grad.to_local().untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)

    def _gone(self, storage, size):
        self._seen.discard(storage)
        self.now -= size


def group_bytes(net):
    """The bytes of this process's shards of each FSDP2 group, with padding."""
    return [
        sum(4 * each.padded_sharded_param_size.numel() for each in group.fsdp_params)
        for module in net.modules()
        if hasattr(module, "_get_fsdp_state")
        for group in module._get_fsdp_state()._fsdp_param_groups
    ]


def gradients_alive(sharding, hybrid=False):
    """Return the most bytes of gradients, ordinary and in backward, and those of each group."""
    if hybrid:
        sharding = sharding | {"mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))}
    most = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        net = train_gpt.GPT(train_gpt.Config(layers=6, width=80, heads=5, context=16, batch=2))
        for block in net.blocks:
            fully_shard(block, **sharding)
        fully_shard(net, **sharding)
        alive = Alive()
        for param in net.parameters():
            param.register_post_accumulate_grad_hook(alive.note)  # before the optimizer's
        optimizer = optim.AdamW(net.parameters(), state_format="8bit")
        if in_backward:
            optimizer.step_in_backward(model=net)
        for step in range(3):
            codes = torch.randint(128, (2, 17), generator=torch.Generator().manual_seed(step))
            train_gpt.cross_entropy(net, codes).backward()
            assert in_backward == all(param.grad is None for param in net.parameters())
            optimizer.step()
            optimizer.zero_grad()
        most.append(alive.most)
    return *most, group_bytes(net)


def test_memory(ranks):
    """The gradients of one group; under HSDP, torch 2.13 keeps those of all groups until backward ends."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for sharding in ({}, {"mp_policy": policy}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}):
        for ordinary, in_backward, groups in ranks.run(2, gradients_alive, sharding):
            assert ordinary == sum(groups) == 957_440  # as docs/step_in_backward.md says
            assert max(groups) == 155_680
            # One group's; a thread of gloo may keep those of the group before for a moment.
            assert in_backward <= 2 * max(groups)
    for ordinary, in_backward, groups in ranks.run(4, gradients_alive, {}, True):
        assert ordinary == in_backward == sum(groups)
