"""Guards the step in backward under FSDP2 on a real GPU: hooks run on FSDP2's streams, and gradients are copied there.

One process with a group of NCCL; tests/test_backward_fsdp.py has several processes on CPUs.
"""

from functools import partial

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from bits import SEALED
from fsdp import Net, train, twins


@pytest.fixture
def mesh():
    distributed.init_process_group("cpu:gloo,cuda:nccl", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cuda", (1,))
    finally:
        distributed.destroy_process_group()


def on_the_gpu(dtype):
    return Net(dtype).cuda()


POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@pytest.mark.parametrize("state_format", ["fp32", "8bit"])
@pytest.mark.parametrize(
    "sharding",
    [{}, {"mp_policy": POLICY, "reshard_after_forward": False}, {"offload_policy": CPUOffloadPolicy()}],
    ids=["float32", "mixed precision", "offload"],
)
def test_the_bits_are_those_of_ordinary_steps(mesh, sharding, state_format):
    act = partial(train, stop=SEALED + 2)
    twins(act, make_net=on_the_gpu, mesh=mesh, sharding=sharding, state_format=state_format)
    twins(partial(train, micro=2, syncs=False, rare=True), make_net=on_the_gpu, mesh=mesh, sharding=sharding)
