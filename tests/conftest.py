"""Settings of torch that a test changes are as they were for the next one."""

import pytest
import torch

from ranks import ranks  # noqa: F401


@pytest.fixture(autouse=True)
def torch_settings():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(params=["cpu", "reference"])
def engine_name(request):
    return request.param
