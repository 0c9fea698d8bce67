"""The numbers that Python shares with ``csrc/`` and with the Triton kernels; each has a name here."""

from __future__ import annotations

from enum import IntEnum


class Dtype(IntEnum):
    """The type of a real number, the same as ``Type`` in csrc/kernels.h."""

    FLOAT32 = 0
    FLOAT64 = 1
    FLOAT16 = 2
    BFLOAT16 = 3


class ParamFormat(IntEnum):
    """How a parameter is stored: alone, or with a residual or master that completes the float32 master weight."""

    PLAIN = 0
    BFLOAT16 = 1
    BFLOAT16_RESIDUAL = 2
    FLOAT16 = 3
    FLOAT16_MASTER = 4
    BFLOAT16_DRAWN = 5  # alone, stochastically rounded


class MomentFormat(IntEnum):
    """How moments are stored: in the compute type, stochastically rounded to bfloat16, or as codes with scales."""

    PLAIN = 0
    BFLOAT16 = 1
    EIGHT_BIT = 2


class Operand(IntEnum):
    """The tensors of a row, the same as ``Operand`` in csrc/kernels.h. The last two have a shape of their own."""

    PARAM = 0
    GRAD = 1
    LOW_BITS = 2  # a residual, or a float32 master
    EXP_AVG = 3
    EXP_AVG_SQ = 4
    MAX_EXP_AVG_SQ = 5
    EMA = 6  # the average of the weights
    EXP_AVG_SCALE = 7
    EXP_AVG_SQ_SCALE = 8


SHAPED_OPERANDS = 7
STEP_ROLE, STREAM_ROLE = -1, -2  # the roles of a row's other two tensors, the same as in csrc/rows.h

BLOCK = 128  # elements of a row that share a scale


class Use(IntEnum):
    """What random bits are for: rounding of different tensors in one step must not depend on each other."""

    MOMENTS = 0
    PARAM = 1
    EMA = 2


USE_SHIFT = 62  # a key of random bits is XORed with its `Use`, shifted by so many bits


class Column(IntEnum):
    """The columns after the addresses in the table of device rows, the same as ``DeviceColumn`` in csrc/rows.h."""

    ELEMENTS = 9
    ROW = 10  # elements with the same index of the first dimension
    FIRST = 11  # this and the next two: a `lucid.engine.shards.Numbering`
    RUN = 12
    STRIDE = 13
    LAYOUT = 14  # where its layout begins in the table of layouts


COLUMNS = 16


class Scalar(IntEnum):
    """The words of a set in a table of scalars, float64. The table's first word is not 0 if the step is skipped."""

    BETA1 = 0
    ONE_MINUS_BETA1 = 1
    BETA2 = 2
    ONE_MINUS_BETA2 = 3
    D = 4
    K = 5
    S = 6
    E = 7
    F = 8
    CAUTIOUS = 9  # not 0: the decay only where it agrees with the update
    EMA_DECAY = 10  # the decay of the average of the weights
    ONE_MINUS_EMA_DECAY = 11
    COUNT = 12  # the step count after this step


SET = 32  # words of a set, some unused, so that kernels shift instead of multiplying


class Told(IntEnum):
    """What the host tells a device that decides: the words before the first set, int64 unless marked float64."""

    SETS = 0  # the number of sets
    MAX_NORM = 1  # float64, infinity for no bound
    SKIPS = 2  # whether a non-finite gradient skips the step
    SCALE = 3  # float64, GradScaler's scale of the gradients
    SCALE_AT = 4  # the address of the scale if it is on the device, else 0
    SCALE_DOUBLE = 5  # whether it is a float64 there
    FOUND_INF_AT = 6  # the address of a float32 found_inf, or 0
    CAPTURED = 7  # whether the step is captured: then the host does not count its replays
    ALARM_AT = 8  # the address, in the host's memory, of an int64 that is set if another process cannot step
    SPIKE_THRESHOLD = 9  # float64
    SPIKES = 10  # the version of the host's memory of norms (`lucid.engine.spikes`), which follows; 0 if there is none
    MEAN = 11  # float64
    SQUARE = 12  # float64
    SEEN = 13
    IN_A_ROW = 14


class ToldOfSet(IntEnum):
    """The words of a set that the host gives to a device that decides.

    The words up to ONE_MINUS_BETA2, and those from CAUTIOUS to COUNT, are those of `Scalar`; these are the others.
    """

    LR = 4  # float64
    WEIGHT_DECAY = 5  # float64
    SIGN = 6  # float64, -1 if the objective is maximized
    LR_AT = 7  # the address of lr if it is on the device, else 0
    LR_DOUBLE = 8  # whether it is a float64 there
    POWERS1 = 13  # the address of the numbers 1 - beta1^t, float64
    LENGTH1 = 14  # how many they are
    POWERS2 = 15
    LENGTH2 = 16
    EPS = 17  # float64
    REFERENCE_LR = 18  # float64; not 0: the decay follows lr / REFERENCE_LR instead of lr


class Kept(IntEnum):
    """The words that stay on a device from step to step; NORM and SCALE describe the last step, as float64."""

    CORRECTION = 0  # to add to the host's step counts
    SKIPPED = 1  # skipped steps that the host has not counted yet
    REFUSED = 2  # steps not taken because another process could not step, of which the host does not know yet
    NORM = 3  # the gradient norm
    SCALE = 4  # GradScaler's scale of the gradients
    SPIKED = 5  # of the skipped steps, those with a spike
    ANEW = 6  # how often the memory of norms became blank, of which the host does not know yet
    SPIKES = 7  # the version of the host's memory that this one continues from
    MEAN = 8  # float64
    SQUARE = 9  # float64
    SEEN = 10
    IN_A_ROW = 11


KEPT = 12

# The exact sum of squares on a device (`lucid.engine.exact_sum`).
COPIES = 8  # sums that programs add to, so that few programs wait for each other
PADDED = 128  # the words of a sum, and unused ones
