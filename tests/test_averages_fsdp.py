"""Guards averages of weights under FSDP2: shards change places, and what FSDP2 has gathered of them is gathered anew.

A gathered copy does not follow when its shard is written. After a forward without gradients the root's parameters stay
gathered by default, so an evaluation would see training weights for averages, and training averages for weights.
"""

from contextlib import suppress

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import lucid.optim as optim
from bits import assert_same, on, same
from fsdp import Net, adamw, sharded, shards, stepping, train
from sharded import whole

RESHARDS = [None, True, False]
TOKENS = torch.arange(12).view(2, 6)


def evaluated(net):
    with torch.no_grad():
        return whole(net(TOKENS, rare=True))


def plain(net, optimizer, dtype=torch.float32, averages=True):
    """A whole model with the averages, or the weights, and what it gives."""
    found = Net(dtype)
    own = dict(found.named_parameters())
    values = optimizer.averages() if averages else dict(net.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(whole(value))
    return evaluated(found)


def trained(dtype=torch.float32, reshard=None, **options):
    net = sharded(Net(dtype), reshard_after_forward=reshard)
    optimizer = adamw(net, ema_decay=0.5, **options)
    train(net, optimizer)
    return net, optimizer


def evaluates_averages(reshard):
    with on("reference"):
        net, optimizer = trained(reshard=reshard)
        twin, other = trained(reshard=reshard)
        before = evaluated(net)
        averaged = plain(net, optimizer)
        assert not torch.equal(averaged, before)
        for _ in range(2):
            with optimizer.averaged(net):
                assert torch.equal(evaluated(net), averaged)
                assert torch.equal(evaluated(net), averaged)
            assert torch.equal(evaluated(net), before)
        train(net, optimizer, 4, 6)
        train(twin, other, 4, 6)
        assert_same(shards(optimizer), shards(other))
        assert torch.equal(evaluated(net), evaluated(twin))
        assert torch.equal(evaluated(net), plain(net, optimizer, averages=False))


@pytest.mark.parametrize("reshard", RESHARDS)
def test_evaluate_enter_evaluate_leave_train(reshard, ranks):
    ranks.run(2, evaluates_averages, reshard)


def swaps_every_format():
    cases = [
        (torch.bfloat16, {}),
        (torch.bfloat16, {"master_weights": "stochastic", "state_format": "bf16"}),
        (torch.float16, {"master_weights": False}),
    ]
    for dtype, options in cases:
        with on("reference"):
            net, optimizer = trained(dtype, **options)
            before, weights = shards(optimizer), evaluated(net)
            averages = {name: whole(value) for name, value in optimizer.averages().items()}
            with optimizer.averaged(net):
                for name, param in net.named_parameters():
                    close = (whole(param).float() - averages[name]).abs() <= averages[name].abs() * 2**-8 + 1e-7
                    assert close.all(), (dtype, name)
                assert not torch.equal(evaluated(net), weights)
            assert_same(shards(optimizer), before)
            assert torch.equal(evaluated(net), weights)


def test_every_format_of_weights(ranks):
    ranks.run(2, swaps_every_format)


def survives_what_happens_inside(reshard):
    def fail(*_):
        raise ValueError("stop")

    with on("reference"):
        net, optimizer = trained(reshard=reshard)
        before = evaluated(net)
        averaged = plain(net, optimizer)
        for module in (net.layers[1], net.norm):
            handle = module.register_forward_pre_hook(fail)
            for _ in range(2):
                with suppress(ValueError), optimizer.averaged(net):
                    evaluated(net)
                    raise AssertionError
            handle.remove()
            assert torch.equal(evaluated(net), before)
        with suppress(ValueError):  # a forward that fails before
            handle = net.norm.register_forward_pre_hook(fail)
            evaluated(net)
        handle.remove()
        with optimizer.averaged(net):
            assert torch.equal(evaluated(net), averaged)
        for part in (net, *net.layers):  # gathered ahead
            part.unshard(async_op=True)
        with optimizer.averaged(net):
            assert torch.equal(evaluated(net), averaged)
            for part in (net, *net.layers):
                part.unshard(async_op=True)
        assert torch.equal(evaluated(net), before)
        net.set_post_optim_event(torch.Event("cpu"))  # of an earlier step: the next gathering must wait for more
        with optimizer.averaged(net):
            assert net._get_fsdp_state()._state_ctx.post_optim_event is None


@pytest.mark.parametrize("reshard", RESHARDS)
def test_a_forward_that_fails_and_parameters_that_are_gathered_ahead(reshard, ranks):
    ranks.run(2, survives_what_happens_inside, reshard)


def refuses():
    with on("reference"):
        net, optimizer = trained()
        before = shards(optimizer)
        with pytest.raises(ValueError, match=r"^model: expected the model, because parameter '.*' is sharded and.*\)$"):
            optimizer.averaged().__enter__()
        with pytest.raises(
            ValueError, match=r"^model: expected the one with all parameters of the optimizer, it lacks"
        ):
            optimizer.averaged(net.layers[0]).__enter__()
        with pytest.raises(RuntimeError, match=r"^within averaged\(\)"), optimizer.averaged(net):
            train(net, optimizer, 4, 5)
        optimizer.zero_grad()
        assert_same(shards(optimizer), before)


def test_a_model_is_needed_and_no_step_is_taken_inside(ranks):
    ranks.run(2, refuses)


def refuses_fsdp1(use_orig_params):
    """A root that FSDP1 keeps gathered after a forward without gradients would evaluate its old weights."""
    net = FullyShardedDataParallel(nn.Linear(8, 4), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    optimizer = optim.AdamW(net.parameters(), ema_decay=0.5)
    x = torch.ones(2, 8)
    with on("reference"):
        net(x).sum().backward()
        optimizer.step()
        with torch.no_grad():
            before = net(x)
            with pytest.raises(ValueError, match=r"^averaged: FSDP1 shards parameter 0 of group 0, and"):
                optimizer.averaged().__enter__()
            assert torch.equal(net(x), before)
        assert optimizer.averages()


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused(ranks, use_orig_params):
    ranks.run(2, refuses_fsdp1, use_orig_params)


def one_refuses():
    """One process is inside and steps; the others, which would wait for it, hear of it."""
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = optim.AdamW([param], ema_decay=0.5, max_grad_norm=1.0, shard_group=distributed.group.WORLD)
    with on("reference"):
        optimizer.step()
        if distributed.get_rank():
            with pytest.raises(RuntimeError, match="process"):
                optimizer.step()
        else:
            with pytest.raises(RuntimeError, match=r"^within averaged\(\)"), optimizer.averaged():
                optimizer.step()
        optimizer.step()
    assert int(optimizer.state[param]["step"]) == 2


def test_the_others_hear_of_a_process_that_cannot_step(ranks):
    ranks.run(2, one_refuses)


def steps_in_backward():
    with on("reference"):
        net, optimizer = stepping(ema_decay=0.5)
        twin = sharded(Net())
        other = adamw(twin, ema_decay=0.5)
        for step in range(3):
            train(net, optimizer, step, step + 1)
            train(twin, other, step, step + 1)
            with optimizer.averaged(net):
                evaluated(net)
        assert_same(shards(optimizer), shards(other))
        assert torch.equal(evaluated(net), evaluated(twin))


def test_between_steps_in_backward(ranks):
    ranks.run(2, steps_in_backward)


def copies():
    with on("reference"):
        net, optimizer = trained()
        averaged = plain(net, optimizer)
        before = shards(optimizer)
        for name, value in optimizer.averages().items():
            assert isinstance(value, DTensor) == (name != "outside"), name
            assert isinstance(value, nn.Parameter) is False
            value.zero_()
        assert_same(shards(optimizer), before)
        targets = {
            "whole": Net(),
            "sharded": sharded(Net(), reshard_after_forward=False),
            "as a whole": fully_shard(Net()),
        }
        other = Net()
        mesh = init_device_mesh("cpu", (2,))
        for part in (*other.layers, other.rare):
            part.weight = nn.Parameter(distribute_tensor(part.weight.detach(), mesh, [Shard(1)]))
            part.bias = nn.Parameter(
                distribute_tensor(part.bias.detach(), mesh, [Replicate()]), part.bias.requires_grad
            )
        for name, target in targets.items():
            evaluated(target)  # so that its parameters are gathered
            optimizer.copy_averages_to(target)
            assert torch.equal(evaluated(target), averaged), name
            for part in target.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()
            assert torch.equal(evaluated(target), averaged), name
        optimizer.copy_averages_to(other)
        own = dict(other.named_parameters())
        for name, value in optimizer.averages().items():
            assert same(whole(own[name]), whole(value)), name
        assert_same(shards(optimizer), before)
        assert not any(isinstance(part, FSDPModule) for part in targets["whole"].modules())


def test_averages_by_name_and_copies_to_models_sharded_and_whole(ranks):
    ranks.run(2, copies)
