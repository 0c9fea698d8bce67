"""Guards the step in backward under FSDP2: the bits of ordinary steps, on one to four processes, in every way to train.

Nearly every case trains twins that are sharded alike, one with ordinary steps and one in backward, and compares each
process's shards of parameters and state to the bit. After backward, only the parameter that FSDP2 does not shard may
have a gradient. What fails, what is refused and what is measured is in test_backward_fsdp_limits.py.
"""

import warnings
from functools import partial

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.optim import lr_scheduler as schedules
from torch.utils.checkpoint import checkpoint

import lucid.optim as optim
from bits import SEALED, assert_same, draw, on
from fsdp import Net, adamw, grads, hooked, sharded, shards, stepping, train, twins
from sharded import KINDS, everyone_has

# Formats


def in_every_format():
    for number, (dtype, options) in enumerate(KINDS.values()):
        act = partial(train, stop=SEALED + 2 if number == 0 else 3)
        twins(act, dtype, sharding={"reshard_after_forward": (True, False, None)[number % 3]}, **options)
    twins(sharding={"reshard_after_forward": False}, state_format="8bit")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_format(ranks, world):
    ranks.run(world, in_every_format)


def on_the_gpu_kernels():
    for state_format in ("fp32", "8bit"):
        with on("cuda"):
            twins(partial(train, stop=2), state_format=state_format)


def test_the_cuda_engine(ranks):
    ranks.run(2, on_the_gpu_kernels)


# Ways to train


def micro_batches():
    for syncs in (True, False):
        twins(partial(train, micro=3, syncs=syncs), state_format="8bit")
    twins(partial(train, micro=2, syncs=False, accumulates=False), state_format="bf16")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for syncs in (True, False):
        # rare=True: without synchronisation, torch 2.13 raises for a module that was never applied.
        act = partial(train, micro=2, syncs=syncs, rare=True)
        twins(act, sharding={"mp_policy": policy}, state_format="8bit")
    twins(sharding={"mp_policy": policy}, dtype=torch.bfloat16, state_format="8bit")


def test_micro_batches_and_mixed_precision(ranks):
    ranks.run(2, micro_batches)


def checkpointed(part, x):
    return checkpoint(part, x, use_reentrant=False)


def reentrant(part, x):
    return checkpoint(part, x, use_reentrant=True)


def a_gradient_of_an_early_micro_batch_only():
    def act(net, optimizer):
        for step in range(3):
            for part, rare in enumerate((True, False)):
                net.set_requires_gradient_sync(part == 1)
                loss = net(torch.full((2, 6), step + part), rare).square().mean()
                loss.backward()
            if hooked(optimizer):
                assert grads(net) == ["outside", "rare.weight", "rare.bias"]
            optimizer.step()
            optimizer.zero_grad()

    twins(act)


def with_a_schedule(net, optimizer):
    schedule = schedules.OneCycleLR(optimizer, [0.1, 0.2], total_steps=5)
    train(net, optimizer, after=schedule.step)


def joining_later(net, optimizer):
    """A frozen bias is thawed, a parameter leaves and joins again, a hook of the user's runs first."""
    train(net, optimizer, 0, 2)
    net.layers[0].bias.requires_grad_(True)
    for step in (2, 3, 4, 5):
        net.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    train(net, optimizer, 6, 8)
    matrices = optimizer.param_groups[0]
    assert matrices["params"].pop(0) is net.embedding.weight
    matrices["param_names"].pop(0)
    net.loss(8).backward()
    optimizer.step()
    assert net.embedding.weight.grad is not None
    optimizer.zero_grad()
    net.embedding.weight.grad = None
    optimizer.add_param_group({"params": [("embedding.weight", net.embedding.weight)]})
    train(net, optimizer, 9, 11)


def evaluating(net, optimizer):
    def evaluate():
        with torch.no_grad():
            net.loss(0)

    evaluate()
    train(net, optimizer, 0, 2, after=evaluate)
    train(net, optimizer, 2, 4, micro=2, syncs=False, after=evaluate)


def kept_gathered(net, optimizer):
    """Weights stay gathered between micro-batches."""
    for step in range(3):
        for part in range(2):
            net.set_reshard_after_backward(part == 1)
            net.set_requires_gradient_sync(part == 1)
            net.loss(step, part).backward()
        assert not hooked(optimizer) or grads(net) == ["outside"]
        optimizer.step()
        optimizer.zero_grad()


class Half(nn.Linear):
    """Uses its weight now and then."""

    def forward(self, x):
        return super().forward(x) if self.uses else x + self.bias


def a_layer_used_by_half(dtype):
    net = Net(dtype)
    net.rare = Half(64, 64, dtype=dtype)
    return net


def unused_on_one_process(net, optimizer):
    """FSDP2 makes zeros for a parameter that one process does not use; there, `step` updates its shard."""
    net.set_reduce_scatter_unused_params(True)
    for step in range(4):
        net.rare.uses = step % 2 == distributed.get_rank()
        net.loss(step, rare=True).backward()
        assert not hooked(optimizer) or grads(net) == ["outside"] + ["rare.weight"] * (not net.rare.uses)
        optimizer.step()
        optimizer.zero_grad()


def a_frozen_layer(dtype):
    net = Net(dtype)
    net.layers[2].requires_grad_(False)
    return net


def ways_to_train():
    twins(evaluating, state_format="8bit")
    twins(kept_gathered, state_format="8bit")
    twins(unused_on_one_process, make_net=a_layer_used_by_half, state_format="8bit")
    twins(make_net=a_frozen_layer, state_format="8bit")
    twins(sharding={"offload_policy": CPUOffloadPolicy(pin_memory=False)}, state_format="8bit")
    twins(partial(train, segment=checkpointed), state_format="8bit")
    twins(partial(train, segment=reentrant), make_net=partial(Net, twice=False), state_format="8bit")
    twins(with_a_schedule, lr=torch.tensor(1e-2))
    twins(joining_later, state_format="8bit")
    a_gradient_of_an_early_micro_batch_only()


def test_ways_to_train(ranks):
    ranks.run(2, ways_to_train)


def compiled(net, optimizer):
    for layer in net.layers:
        layer.compile(backend="aot_eager")
    train(net, optimizer)


def a_penalty_on_the_shards(net, optimizer):
    """Autograd calls hooks of the shards before FSDP2 does, once even after the whole parameter's gradient is there."""
    params = [param for group in optimizer.param_groups for param in group["params"] if isinstance(param, DTensor)]
    norm = params[-1]
    assert norm is net.norm.bias  # one of the root module's, which FSDP2 reduces last
    for step in range(3):
        before = norm.to_local().square().sum()
        loss = net.loss(step)
        (before + loss + sum(param.to_local().square().sum() for param in params if param is not norm)).backward()
        if hooked(optimizer):
            unused = ["rare.weight", "rare.bias"] * (step % 2 == 0)
            assert grads(net) == ["outside", *unused]
        optimizer.step()
        optimizer.zero_grad()


def sharded_otherwise():
    """Several modules in one group, made without memory first, matrices cut along their columns."""
    runs = []
    for in_backward in (False, True):
        with torch.device("meta"):
            net = Net()
        fully_shard([net.layers[0], net.layers[1]])
        fully_shard(net.layers[2], shard_placement_fn=lambda param: Shard(param.ndim - 1))
        fully_shard(net)
        net.to_empty(device="cpu")
        optimizer = adamw(net)
        if in_backward:
            optimizer.step_in_backward(model=net)
        with torch.no_grad():
            for number, param in enumerate(net.parameters()):
                param.to_local().copy_(draw(number, param.to_local().shape) / 8)
        for step in range(3):
            net.loss(step, rare=True).backward()
            assert bool(grads(net)) != in_backward
            optimizer.step()
            optimizer.zero_grad()
        runs.append(shards(optimizer))
    assert_same(*runs)


def two_optimizers():
    runs = []
    for in_backward in (False, True):
        net = sharded(Net())
        params = list(net.parameters())
        optimizers = [optim.AdamW(part, state_format="8bit") for part in (params[:3], params[3:])]
        for optimizer in optimizers if in_backward else []:
            optimizer.step_in_backward(model=net)
        for step in range(3):
            net.loss(step).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        runs.append([entry for optimizer in optimizers for entry in shards(optimizer)])
    assert_same(*runs)


def beside_others():
    twins(compiled, make_net=partial(Net, twice=False))
    twins(a_penalty_on_the_shards)
    sharded_otherwise()
    two_optimizers()


def test_beside_other_things(ranks):
    ranks.run(2, beside_others)


class Columns(Net):
    """Tensor parallelism on one dimension of a mesh, FSDP2 on the other."""

    def __init__(self, dtype, mesh):
        super().__init__(dtype)
        plan = {f"layers.{number}": ColwiseParallel(output_layouts=Replicate()) for number in range(3)}
        parallelize_module(self, mesh, plan)


def meshes_of_two_dimensions():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    twins(mesh=mesh, state_format="8bit")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    twins(partial(train, micro=2, syncs=False), mesh=mesh, sharding={"mp_policy": policy}, nonfinite="error")
    partly = partial(without_all_reduce, micro=2)
    twins(partly, mesh=mesh, state_format="bf16")
    twins(make_net=partial(Columns, mesh=mesh["inner"]), mesh=mesh["outer"])


def without_all_reduce(net, optimizer, micro):
    """Micro-batches of HSDP that are reduced over shards and not over replicas."""
    for step in range(3):
        for part in range(micro):
            net.set_requires_all_reduce(part == micro - 1)
            net.loss(step, part).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_hybrid_sharding_and_tensor_parallelism(ranks):
    ranks.run(4, meshes_of_two_dimensions)


# Around the step


def saved_and_loaded():
    for state_format in ("fp32", "8bit"):
        expected = adamw(net := sharded(Net()), state_format=state_format)
        train(net, expected)
        for ways in ((True, False), (False, True), (True, True)):
            runs = []
            for in_backward, start in zip(ways, (0, 2), strict=True):
                net = sharded(Net())
                optimizer = adamw(net, state_format=state_format)
                if in_backward:
                    optimizer.step_in_backward(model=net)
                if runs:
                    set_state_dict(net, optimizer, model_state_dict=runs[0][0], optim_state_dict=runs[0][1])
                else:
                    get_state_dict(net, optimizer)  # which steps with lr 0, and counts nothing
                train(net, optimizer, start, start + 2)
                runs.append(get_state_dict(net, optimizer))
            assert_same(shards(optimizer), shards(expected), f"{ways} {state_format}")
        made_early = adamw(net := sharded(Net()), state_format=state_format)
        made_early.init_state()
        made_early.step_in_backward(model=net)
        train(net, made_early)
        assert_same(shards(made_early), shards(expected), "init_state")


def test_checkpoints(ranks):
    ranks.run(2, saved_and_loaded)


def observed():
    runs = []
    for in_backward in (False, True):
        net = sharded(Net())
        optimizer = adamw(net, nonfinite="error")
        if in_backward:
            optimizer.step_in_backward(model=net)
        optimizer.observe()
        runs.append([])
        train(net, optimizer, after=lambda optimizer=optimizer: runs[-1].append(optimizer.statistics()))
    for ordinary, in_backward in zip(*runs, strict=True):
        own = {key: value for key, value in in_backward.items() if not key.startswith("outside/")}
        assert everyone_has(own)
        assert len(own) > 70
        # In backward, the parameters that had no gradient in this step keep their last observation.
        assert {key: own[key] for key in own if key.startswith("layers")} == {
            key: ordinary[key] for key in own if key.startswith("layers")
        }


def test_statistics(ranks):
    ranks.run(2, observed)


def switched():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RuntimeWarning)

        def to_and_fro(net, optimizer):
            in_backward = hooked(optimizer)
            for start in range(0, 8, 2):
                if in_backward and start % 4:
                    optimizer.step_in_backward(False)
                    assert hooks(net) == 0
                elif in_backward:
                    optimizer.step_in_backward(model=net)
                    assert hooks(net) >= 10
                train(net, optimizer, start, start + 2)

        twins(to_and_fro)
    assert not [each for each in said if issubclass(each.category, RuntimeWarning)]
    net, optimizer = stepping()
    train(net, optimizer)
    del optimizer
    assert hooks(net) == 0
    net.loss(0).backward()
    assert len(grads(net)) > 6


def hooks(net):
    """How many there are of the optimizer's, on shards, on gathered parameters, and on modules."""
    groups = [group for module in net.modules() if hasattr(module, "_get_fsdp_state") for group in fsdp_groups(module)]
    params = [param for group in groups for each in group.fsdp_params for param in both(each)]
    return sum(len(param._post_accumulate_grad_hooks or ()) for param in dict.fromkeys(params))


def fsdp_groups(module):
    return module._get_fsdp_state()._fsdp_param_groups


def both(each):
    return [param for param in (each.sharded_param, getattr(each, "_unsharded_param", None)) if param is not None]


def test_to_and_fro(ranks):
    ranks.run(2, switched)
