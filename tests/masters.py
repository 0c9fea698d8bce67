"""16-bit parameters, and the float32 numbers that they are with their residuals or masters."""

import torch

from bits import results

HALVES = [torch.bfloat16, torch.float16]
FORMATS = ["fp32", "bf16", "8bit"]
SLOT = {torch.bfloat16: "residual", torch.float16: "master"}


def joined(param, residual):
    """The float32 number whose upper half is the parameter: written apart from the code under test."""
    return ((param.view(torch.int16).int() << 16) + residual.view(torch.int16).int()).view(torch.float32)


def of_masters(optimizer):
    """`results` as a run with float32 parameters has them; the parameters must be their masters, rounded."""
    rows = results(optimizer)
    for row in rows:
        param = row["param"]
        if "residual" in row:
            master = joined(param, row.pop("residual"))
            bits = master.view(torch.int32)
            assert torch.equal(param.view(torch.int16), (bits + 0x8000 >> 16).to(torch.int16))
            row["param"] = master
        elif "master" in row:
            row["param"] = row.pop("master")
            assert torch.equal(param.view(torch.int16), row["param"].half().view(torch.int16))
        for key in row.keys() & {"exp_avg", "exp_avg_sq"}:  # in bfloat16 perhaps: -0 is not 0
            if row[key].dtype == torch.bfloat16:
                row[key] = row[key].view(torch.int16)
    return rows
