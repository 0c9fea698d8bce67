"""Guards that the step in backward does nothing, and says so, while a process group is initialized.

Which process averages what, and when, cannot be seen from a parameter's hook. So DDP in all its ways, and averages by
hand, are plainly the ordinary step: the same gradients are there when `step()` is called, the same bits come of it, and
all processes have the same. The two processes are started once, for all cases together.
"""

import math
import traceback
import warnings
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import lucid.optim as optim
from bits import assert_same, draw, results
from twins import Chain, Raise, grads, hooked, reentrant, train, twins

WARNED = "step_in_backward() does nothing while a process group is initialized, because "


@contextmanager
def group_of_one():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def test_a_process_group_that_comes_and_goes():
    def act(net, optimizer):
        train(net, optimizer, 0, 4)
        warns = pytest.warns(RuntimeWarning) if hooked(optimizer) else nullcontext([])
        with group_of_one():
            with warns as warned:
                optimizer.zero_grad()
                net.loss(4).backward()
                assert len(grads(net)) == 5
                optimizer.step()
                assert bool(grads(net)) != hooked(optimizer)
                train(net, optimizer, 5, 8)
            assert [str(each.message).startswith(WARNED) for each in warned] == [True] * hooked(optimizer)
            train(net, optimizer, 8, 9)  # no word more
        optimizer.zero_grad()
        net.loss(9).backward()
        assert bool(grads(net)) != hooked(optimizer)
        optimizer.step()
        train(net, optimizer, 10, 14)

    twins(act)


def train_replica(
    rank, in_backward, *, micro=1, short=False, fails="", by_hand=False, accumulates=False, two=False, more=(), **ddp
):
    """Train `Chain` for five steps; return its bits, the gradients that steps found and left, how often it warned."""
    chain = Chain()
    replica = chain if by_hand else DistributedDataParallel(chain, bucket_cap_mb=0.0002, **ddp)
    params = list(chain.parameters())
    optimizers = [
        optim.AdamW(part, 0.05, nonfinite="error") for part in ([params[:3], params[3:]] if two else [params])
    ]
    found, left = [], []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for optimizer in optimizers:
            optimizer.step_in_backward(in_backward)
        for step in range(5):
            wrong = fails if step == 2 else ""
            for optimizer in optimizers:
                optimizer.zero_grad()
            for part in range(micro):
                with ExitStack() as around:
                    if part < micro - 1:
                        around.enter_context(replica.no_sync())
                    for optimizer in optimizers if part < micro - 1 or accumulates else []:
                        around.enter_context(optimizer.accumulate())
                    x = draw(1000 * rank + 10 * step + part, (4, 6))
                    y = replica(x, short=short and (step % 2 == 0 or rank == 0), **dict(more))
                    loss = Raise.apply(y.square().mean(), wrong == "error") * (math.nan if wrong == "NaN" else 1.0)
                    if wrong == "error":
                        around.enter_context(pytest.raises(ArithmeticError))
                    loss.backward()
            for param in params if by_hand and wrong != "error" else []:
                distributed.all_reduce(param.grad)
                param.grad /= 2
            found.append(grads(chain))
            for optimizer in optimizers if wrong != "error" else []:
                with pytest.raises(FloatingPointError) if wrong == "NaN" else nullcontext():
                    optimizer.step()
            if not wrong:
                left += grads(chain)
    warned = sum(issubclass(each.category, RuntimeWarning) and str(each.message).startswith(WARNED) for each in said)
    return [result for optimizer in optimizers for result in results(optimizer)], found, left, warned


UNUSED, BUCKETS = {"find_unused_parameters": True, "short": True}, {"gradient_as_bucket_view": True}
KINDS = {"plain": {}, "buckets": BUCKETS, "unused": UNUSED, "unused, buckets": UNUSED | BUCKETS}
REPLICAS = {
    **KINDS,
    **{f"{kind}, micro-batches": options | {"micro": 3} for kind, options in KINDS.items()},
    "static graph": {"static_graph": True},  # which torch does not let begin in no_sync()
    "an error": {"fails": "error"},
    "not finite": {"fails": "NaN"},
    "by hand": {"by_hand": True},
    "by hand, accumulates": {"by_hand": True, "accumulates": True},
    "two optimizers": {"two": True},
    "reentrant": {"more": {"segment": reentrant}},
    "reentrant, accumulates": {"more": {"segment": reentrant}, "accumulates": True},
}


def replicas(folder):
    """What a process of its own does: all cases, each with ordinary steps and in backward."""
    rank, found = distributed.get_rank(), {}
    for name, options in REPLICAS.items():
        try:
            found[name] = [train_replica(rank, in_backward, **options) for in_backward in (False, True)]
        except BaseException:  # pytest's own among them
            found[name] = traceback.format_exc()
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def replicated(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    ranks.run(2, replicas, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def check(runs, options):
    """Compare an ordinary run with one in backward; return the bits of both."""
    assert not isinstance(runs, str), runs
    (bits, found, left, warned), (bits_in_backward, found_in_backward, left_in_backward, warned_in_backward) = runs
    assert_same(bits_in_backward, bits, "in backward and ordinary")
    assert int(bits[0]["step"]) == 5 - ("fails" in options)
    assert found == found_in_backward
    assert found[0]
    assert left
    assert not left_in_backward
    assert not warned
    assert warned_in_backward == (0 if "accumulates" in options else 1 + ("two" in options))
    return bits


@pytest.mark.parametrize("name", REPLICAS)
def test_replicas_are_those_of_ordinary_steps(replicated, name):
    one, two = (check(process[name], REPLICAS[name]) for process in replicated)
    assert_same(one, two, "the two processes")


@pytest.mark.parametrize("name", ["plain", "buckets", "plain, micro-batches"])
def test_a_replica_alone_is_that_of_ordinary_steps(name):
    with group_of_one():
        check([train_replica(0, in_backward, **REPLICAS[name]) for in_backward in (False, True)], REPLICAS[name])
