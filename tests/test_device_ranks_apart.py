"""Guards that processes which cannot all leave a step to their devices still do the same exchanges, and nobody hangs.

A process's host decides where it has new state, or no gradient at all, while the devices of the others decide. A
process may fail before the exchange. torch may create state by a step whose learning rate only a device knows.
"""

import math
import warnings
from unittest import mock

import pytest
import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import lucid.optim as optim
from bits import SEALED, draw, on, peek, same
from deciding import decisions
from launchers import Device
from lucid import engine
from lucid.engine import only
from lucid.optim import atomic_step, gradients
from sharded import SHAPES, assert_whole, everyone_has, give_gradients, spread_over, whole
from test_device_ranks import device

NAN, INF = math.nan, math.inf
OTHER = "another process could not step"


def pair(mesh, shapes=SHAPES[:3], **options):
    spread, plain = spread_over(mesh, [Shard(0)], shapes)
    return optim.AdamW(spread, lr=1e-2, **options), optim.AdamW(plain, lr=1e-2, **options), spread, plain


def host_beside_devices(options):
    """A parameter whose gradient one process gets later than the others; then a process without any gradient."""
    own = distributed.get_rank()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    extra = [torch.nn.Parameter(draw(99, (7,))) for _ in range(2)]  # plain: each process has its own gradient
    ours, _, spread, plain = pair(mesh, **options)
    twin, _, twins, _ = pair(mesh, **options)
    ours.add_param_group({"params": [extra[0]]})
    twin.add_param_group({"params": [extra[1]]})
    with device(Device()) as asked:
        for step in range(8):
            for params in (spread, twins):
                give_gradients(params, plain, step)
            for param in extra:
                param.grad = draw(step, (7,)) if step >= 2 + own else None
            if step == 6 and own == 0:
                for param in (*spread, *twins, *extra):
                    param.grad = None
            asked.forget()
            with on("cuda"):
                ours.step()
            with only("cpu"):
                twin.step()
            by_device = step not in (0, 2 + own) and (step != 6 or own != 0)
            assert decisions(asked) == by_device, step
            assert same(ours.grad_norm, twin.grad_norm)
        assert everyone_has(decisions(asked))
        with on("cuda"):
            for mine, its in zip([*spread, extra[0]], [*twins, extra[1]], strict=True):
                assert same(whole(mine), whole(its))
                left, right = ours.state[mine], twin.state[its]
                assert all(same(whole(left[key]), whole(right[key])) for key in left)


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.5}, {"nonfinite": "skip"}], ids=str)
def test_hosts_and_devices_decide_the_same_step(ranks, options):
    ranks.run(3, host_beside_devices, options)


def engines_differ():
    """As where the parameters of one process are on another kind of device."""
    mesh = init_device_mesh("cpu", (2,))
    with device(Device()) as asked:
        ours, theirs, spread, plain = pair(mesh, max_grad_norm=0.5, nonfinite="skip")
        for step in range(5):
            give_gradients(spread, plain, step)
            if step == 3:
                spread[0].grad.to_local()[:1] = plain[0].grad[0] = NAN
            with on("cuda") if distributed.get_rank() else only("reference"):
                ours.step()
            theirs.step()
            assert same(ours.grad_norm, theirs.grad_norm)
        assert decisions(asked) == 4 * distributed.get_rank()
        assert ours.skipped_steps == theirs.skipped_steps == 1
        assert_whole(ours, theirs)


def test_engines_differ(ranks):
    ranks.run(2, engines_differ)


# Failures


def spoil_state(optimizer, param):
    entry = optimizer.state[param]
    entry["exp_avg"] = entry["exp_avg"].double()


def spoil_rate(optimizer, param):
    optimizer.param_groups[0]["lr"] = -1.0


def spoil_groups(optimizer, param):
    optimizer.param_groups.append(3)


def spoil_kernel(optimizer, param):
    raise_once = launcher().prepare

    def prepare(*args):
        launcher().prepare = raise_once
        raise MemoryError("no memory for a kernel")

    launcher().prepare = prepare


def launcher():
    from lucid.engine.cuda import launch

    return launch._launchers[1, 0]


SPOIL = {
    spoil_state: (ValueError, "exp_avg"),
    spoil_rate: (ValueError, "lr: expected"),
    spoil_groups: (TypeError, r"param_groups\[1\]"),
    spoil_kernel: (MemoryError, "no memory"),
}
NOTICE = {  # what makes the others raise
    "step": lambda optimizer: optimizer.step(),
    "state": lambda optimizer: optimizer.state,
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "skipped_steps": lambda optimizer: optimizer.skipped_steps,
}


def one_fails(spoil, notice, options):
    """The others write nothing, and say so when their hosts next look."""
    own = distributed.get_rank()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    with device(Device()) as asked, on("cuda"):
        ours, theirs, spread, plain = pair(mesh, **options)
        for step in range(3):
            give_gradients(spread, plain, step)
            ours.step()
            with only("cpu"):
                theirs.step()
        before = [whole(param) for param in spread], ours.grad_norm.clone()
        saved = [dict(peek(ours)[param]) for param in spread], list(ours.param_groups), dict(ours.param_groups[0])
        give_gradients(spread, plain, 7)
        asked.forget()
        if own == 1:
            spoil(ours, spread[0])
            kind, said = SPOIL[spoil]
            with pytest.raises(kind, match=said):
                ours.step()
            for entry, right in zip((ours.state[param] for param in spread), saved[0], strict=True):
                entry.update(right)
            ours.param_groups[:] = saved[1]
            ours.param_groups[0].update(saved[2])
            if notice == "step":  # in which the others raise, and this one skips it
                ours.step()
                assert decisions(asked) == 1
        else:
            ours.step()
            assert decisions(asked) == 1
            assert same(ours.grad_norm, before[1])
            with pytest.raises(RuntimeError, match=OTHER):
                NOTICE[notice](ours)
        assert all(map(same, before[0], [whole(param) for param in spread]))
        assert ours.skipped_steps == (own == 1 and notice == "step")
        for step in range(3, 5):
            give_gradients(spread, plain, step)
            ours.step()
            with only("cpu"):
                theirs.step()
            assert same(ours.grad_norm, theirs.grad_norm)
        assert_whole(ours, theirs)
        assert {entry["step"].item() for entry in ours.state.values()} == {5.0}


@pytest.mark.parametrize("spoil", SPOIL, ids=lambda spoil: spoil.__name__)
def test_others_do_not_wait_for_one_that_fails(ranks, spoil):
    ranks.run(3, one_fails, spoil, "step", {"max_grad_norm": 0.5})


@pytest.mark.parametrize("notice", NOTICE)
def test_others_raise_when_they_next_look(ranks, notice):
    ranks.run(2, one_fails, spoil_state, notice, {"nonfinite": "skip"})


def others_fail_late(options):
    """Who is told late of a failure raises once, and not again because others were told of that."""
    own = distributed.get_rank()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    raised = []
    with device(Device()), on("cuda"):
        ours, _, spread, plain = pair(mesh, **options)
        for step in range(8):
            give_gradients(spread, plain, step)
            if step == 2 and own == 1:
                right = dict(peek(ours)[spread[0]])
                spoil_state(ours, spread[0])
            try:
                ours.step()
            except (RuntimeError, ValueError):
                raised.append(step)
            if step == 2 and own == 1:
                ours.state[spread[0]].update(right)
        assert raised == [2 if own == 1 else 3]
        assert ours.skipped_steps == (own == 1)
        assert {entry["step"].item() for entry in ours.state.values()} == {6.0}
    assert everyone_has([whole(param).tolist() for param in spread])


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.5}, {"nonfinite": "skip"}], ids=str)
def test_an_error_does_not_come_back(ranks, options):
    ranks.run(3, others_fail_late, options)


def measuring_fails():
    """On one process's host: it takes part in the exchange all the same."""
    mesh = init_device_mesh("cpu", (2,))
    ours, theirs, spread, plain = pair(mesh, max_grad_norm=0.5)
    for step in range(4):
        give_gradients(spread, plain, step)
        if step == 2:
            if distributed.get_rank() == 1:
                failing = mock.patch.object(engine.Plan, "measure", side_effect=MemoryError("no memory"))
                with failing, pytest.raises(MemoryError):
                    ours.step()
            else:
                with pytest.raises(RuntimeError, match=OTHER):
                    ours.step()
        ours.step()
        theirs.step()
    assert_whole(ours, theirs)


def test_a_host_that_cannot_measure_tells_the_others(ranks):
    ranks.run(2, measuring_fails)


def the_exchange_fails():
    """On every process, before anything is written; it is not tried again."""
    mesh = init_device_mesh("cpu", (2,))
    with device(Device()), on("cuda"):
        ours, theirs, spread, plain = pair(mesh, max_grad_norm=0.5)
        for step in range(4):
            give_gradients(spread, plain, step)
            if step == 2:
                before = [whole(param) for param in spread]
                lost = mock.patch.object(distributed, "all_reduce", side_effect=RuntimeError("no connection"))
                with lost as reduce, pytest.raises(RuntimeError, match="no connection"):
                    ours.step()
                assert reduce.call_count == 1
                assert all(map(same, before, [whole(param) for param in spread]))
            ours.step()
            with only("cpu"):
                theirs.step()
        assert_whole(ours, theirs)


def test_an_exchange_that_fails_leaves_everything(ranks):
    ranks.run(2, the_exchange_fails)


# Steps by which torch creates state


def rate_on_host():
    """A learning rate in a tensor of the host's makes processes exchange, and no host waits for that."""
    mesh = init_device_mesh("cpu", (2,))
    with device(Device()) as asked, on("cuda"):
        ours, theirs, spread, plain = pair(mesh)
        with (
            mock.patch.object(gradients, "is_on", return_value=False),
            mock.patch.object(atomic_step, "is_on", return_value=False),
        ):
            for step in range(4):
                give_gradients(spread, plain, step)
                for each in (ours, theirs):
                    each.param_groups[0]["lr"] = torch.tensor(0.01 * (step + 1))
                ours.step()
                with only("cpu"):
                    theirs.step()
        assert decisions(asked) == 3
        assert_whole(ours, theirs)


def test_no_host_waits_because_of_a_rate_in_a_tensor(ranks):
    ranks.run(2, rate_on_host)


def created(judges):
    """By torch's tools, with a learning rate on the device: nothing is counted."""
    mesh = init_device_mesh("cpu", (2,))
    options = {"max_grad_norm": 1.0} if judges else {}
    with device(Device()), on("cuda"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.nn.Linear(6, 5)
        for name, param in list(model.named_parameters()):
            spread = torch.distributed.tensor.distribute_tensor(param.detach(), mesh, [Shard(0)])
            setattr(model, name, torch.nn.Parameter(spread))
        ours = optim.AdamW(model.named_parameters(), lr=torch.tensor(0.1), **options)
        get_optimizer_state_dict(model, ours)
        assert len(ours.state) == 2
        assert all(entry["step"] == 0 for entry in ours.state.values())


def zero_rates(judges):
    """A first step with a rate of 0 counts on all if one process has a gradient; later ones too, whoever is late."""
    own = distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    options = {"max_grad_norm": 1.0} if judges else {}
    with device(Device()) as asked, on("cuda"):
        ours, _, spread, plain = pair(mesh, [(6, 5), (4, 3)], **options)
        ours.param_groups[0]["lr"] = torch.tensor(0.0)
        give_gradients(spread, plain, 0)
        spread[1].grad = None
        spread[0].grad.to_local().zero_() if own == 0 else None
        ours.step()
        assert ours.state[spread[0]]["step"] == 1
        for step in range(1, 4):
            give_gradients(spread, plain, step)
            if step == 1 or (step == 2 and own == 0):
                spread[1].grad = None
            asked.forget()
            ours.step()
            assert decisions(asked) == (step != 2 + (1 - own) if step > 1 else 1)
        assert ours.state[spread[0]]["step"] == 4
        assert ours.state[spread[1]]["step"] == (1 if own == 0 else 2)


@pytest.mark.parametrize("judges", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("act", [created, zero_rates], ids=lambda act: act.__name__)
def test_a_rate_of_zero_that_only_a_device_knows(ranks, act, judges):
    ranks.run(2, act, judges)


# What is left to the hosts


def left_to_hosts():
    """Observing of sharded parameters, bounds of 2^63 and more with "skip", and "error": by all processes alike."""
    mesh = init_device_mesh("cpu", (2,))
    for options, observes, decided in [
        ({"max_grad_norm": 0.5}, True, 0),
        ({"max_grad_norm": 2.0**63, "nonfinite": "skip"}, False, 0),
        ({"max_grad_norm": 2.0**63}, False, 2),
        ({"max_grad_norm": 1.0, "nonfinite": "error"}, False, 0),
    ]:
        with device(Device()) as asked, on("cuda"):
            ours, theirs, spread, plain = pair(mesh, **options)
            for each in (ours, theirs):
                each.observe(observes)
            for step in range(3):
                give_gradients(spread, plain, step)
                ours.step()
                with only("cpu"):
                    theirs.step()
                assert same(ours.grad_norm, theirs.grad_norm)
            assert decisions(asked) == decided, (options, decisions(asked))
            assert_whole(ours, theirs)
            if observes:
                assert ours.statistics()["grad_norm"] == pytest.approx(theirs.statistics()["grad_norm"])


def test_what_is_left_to_the_hosts(ranks):
    ranks.run(2, left_to_hosts)


def too_large_after_clipping():
    """Under a bound of 2^63 or more a clipped gradient may be too large: only hosts look, and all skip."""
    mesh = init_device_mesh("cpu", (2,))
    with device(Device()), on("cuda"):
        ours, _, spread, plain = pair(mesh, [(4, 3)], max_grad_norm=2.0**65, nonfinite="skip")
        for step in range(3):
            give_gradients(spread, plain, step)
            plain[0].grad[3, 1] = 2.0**70 if step == 2 else 1.0
            spread[0].grad = torch.distributed.tensor.distribute_tensor(plain[0].grad, mesh, [Shard(0)])
            ours.step()
        assert ours.skipped_steps == 1


def test_a_clipped_gradient_that_is_too_large(ranks):
    ranks.run(2, too_large_after_clipping)


def captured_steps():
    """They are refused on every process, without an exchange."""
    mesh = init_device_mesh("cpu", (2,))
    with device(Device()), on("cuda"):
        ours, theirs, spread, plain = pair(mesh, max_grad_norm=0.5)
        for step in range(3):
            give_gradients(spread, plain, step)
            if step == 2:
                capturing = mock.patch.object(engine.cuda, "is_capturing", return_value=True)
                all_reduce = mock.patch.object(distributed, "all_reduce")
                with capturing, all_reduce as reduce, pytest.raises(RuntimeError, match="not sharded"):
                    ours.step()
                assert not reduce.called
            ours.step()
            with only("cpu"):
                theirs.step()
        assert_whole(ours, theirs)


def test_captured_steps_are_refused(ranks):
    ranks.run(2, captured_steps)


def a_long_run():
    """Until nobody reads the state any more; a process is told of others' failures in every step in vain."""
    mesh = init_device_mesh("cpu", (2,))
    with device(Device()) as asked, on("cuda"):
        ours, theirs, spread, plain = pair(mesh, max_grad_norm=0.5, nonfinite="skip")
        for step in range(SEALED + 6):
            give_gradients(spread, plain, step)
            ours.step()
            with only("cpu"):
                theirs.step()
        assert decisions(asked) == SEALED + 5, (decisions(asked), SEALED)
        assert isinstance(spread[0], DTensor)
        assert_whole(ours, theirs)


def test_a_long_run(ranks):
    ranks.run(2, a_long_run)
