"""The CUDA engine's kernels, compiled ahead for GPUs that are not there: the machine code keeps the contract.

A process for each target compiles them, through the engine itself, with a machine in the place of Triton's that only
says what it is; what comes out is read here. PTX says how every operation rounds, and ptxas keeps to it: ``add.rn`` and
``mul.rn`` are never fused. So the text is read for what may not be in it, and for some kernels also what ptxas makes of
it when it is allowed to fuse and division and square root, which it makes of fused operations, are taken out. AMD GPUs
are not supported; that the kernels compile for one, and round alike, is kept true.
"""

import functools
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from lucid.engine.cuda.row_table import DeviceRow
from lucid.engine.numbers import KEPT, Column

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
NVIDIA = ("sm_80", "sm_90")
LIMIT = 270  # seconds that all processes together may take

TYPES = ["float32", "float64", "float16", "bfloat16"]  # numbered as in csrc/kernels.h, as are forms and moments
SIZES = dict(zip(TYPES, (4, 8, 2, 2), strict=True))
FORMS = ["plain", "bfloat16", "bfloat16+residual", "float16", "float16+master", "bfloat16+drawn"]
MOMENTS = ["plain", "bf16", "8bit"]

# Kinds of rows. The first word is the parameter; a gradient is of its type if nothing is said.
UPDATES = [
    "float32",
    "float32 amsgrad",
    "float32 narrow",
    "float32 strided amsgrad",
    "float32 from-float64",
    "float32 from-bfloat16 amsgrad narrow",
    "float64",
    "float64 from-float32 amsgrad",
    "float64 strided narrow ema cautious",
    "bfloat16",
    "bfloat16+residual amsgrad",
    "float16 from-float64 strided",
    "float16+master from-float32",
    "float32 bf16",
    "float32 bf16 numbered amsgrad",
    "bfloat16+drawn from-float64 bf16 amsgrad ema cautious",
    "bfloat16+residual bf16",
    "bfloat16+residual from-float64 bf16 strided",
    "float16 from-float32 bf16 narrow",
    "float16+master bf16 numbered ema",
    "float32 8bit",
    "float32 8bit numbered amsgrad ema",
    "float32 8bit odd",
    "float32 8bit strided ema",
    "bfloat16 from-float32 8bit",
    "bfloat16+residual 8bit",
    "bfloat16+residual from-float32 8bit odd numbered narrow ema",
    "float16 8bit amsgrad",
    "float16+master from-float64 8bit",
    "float16+master 8bit odd",
    "float32 ema",
    "float32 cautious",
    "bfloat16+drawn 8bit",
]
OBSERVED = ["float32", "float64", "bfloat16+residual bf16", "float32 8bit", "float32 8bit odd"]
MEASURED = ["float32", "float32 strided", "float32 from-float64", "float64", "bfloat16", "float16 narrow"]

DECIDING = ["settle", "decide measured", "decide together", "decide"]
NAMES = [*UPDATES, *(f"observed {name}" for name in OBSERVED), *(f"squares {name}" for name in MEASURED), *DECIDING]
# Those of which is seen what ptxas makes of them.
ASSEMBLED = {
    "float32 amsgrad",
    "float32 strided amsgrad",
    "float64",
    "bfloat16+residual bf16",
    "float16 8bit amsgrad",
    "float16+master 8bit odd",
    "float32 ema",
    "observed float32 8bit",
    "squares float64",
    "decide measured",
}
# These divide no integers, which AMD's compiler does with fused operations on floating-point numbers.
AMD = ["float32 amsgrad", "bfloat16+residual bf16", "float16+master from-float32", "float32 ema"]
WANTED = {
    "sm_90": NAMES,
    "sm_80": [name for number, name in enumerate(NAMES) if number % 3 == 0 or name in {*ASSEMBLED, *DECIDING}],
    "gfx942": [*AMD, "float64", "float32 8bit", "bfloat16+residual 8bit", "squares float32", *DECIDING],
}


def row_of(name):
    """The row that is named so."""
    param, *words = name.split()
    form = FORMS.index(param) if param in FORMS else 0
    own = param.split("+")[0]
    given = next((word.removeprefix("from-") for word in words if word.startswith("from-")), own)
    return DeviceRow(
        row=0,
        device_type=1,
        device_index=0,
        compute=TYPES.index("float64" if own == "float64" else "float32"),
        gradient=TYPES.index(given),
        form=form,
        moments=next((MOMENTS.index(word) for word in words if word in MOMENTS), 0),
        amsgrad="amsgrad" in words,
        ema="ema" in words,
        dims=3 if "strided" in words else 0,
        numbered="numbered" in words,
        whole_rows="odd" not in words,
        wide="narrow" not in words,
        elements=1 << 20,
    )


# What happens in a process that compiles


class Machine:
    """What Triton knows of a GPU: which it is, and that whatever fits can be loaded."""

    def __init__(self, target):
        self.target, self.utils = target, self

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 48 * 1024}

    def launcher_cls(self, src, metadata):
        return None

    def load_binary(self, name, kernel, shared, device):
        return None, None, 0, 0, 1024  # module, function, registers, spills, threads


class Native:
    """What the plan in C++ says of its rows."""

    device_structure = 0
    serial = False

    def __init__(self, names):
        self._rows = [row_of(name) for name in names]

    def device_rows(self):
        return self._rows

    def write_device_rows(self, table, layouts):
        pass


def launches(names):
    """Yield (name, launch) of what the engine prepares of what is named."""
    from contextlib import nullcontext

    import torch

    from lucid.engine.cuda import launch
    from lucid.engine.cuda.device_tables import DeviceTables
    from lucid.engine.cuda.row_table import RowTable
    from lucid.engine.scalars import Recipe
    from lucid.engine.spikes import ToldMemory
    from lucid.engine.verdict import DeviceVerdict

    class Ahead(launch.GPU):
        """The launcher for GPUs, on the host's memory."""

        def current(self):
            return nullcontext()

        def stream(self):
            return 0

        def staging(self, words):
            return self.empty(words)

    def tables(names):
        rows = RowTable(Native(names))
        rows.table[:, Column.ROW] = 200  # elements of a row, so that odd ones have programs
        return DeviceTables(Ahead(torch.device("cpu")), (1, 0), rows)

    for cautious in (False, True):
        updates = [name for name in UPDATES if name in names and ("cautious" in name.split()) == cautious]
        found = tables(updates).updates(some_cautious=cautious, observe=False) if updates else []
        yield from zip(updates, found, strict=True)
    observed = [name for name in OBSERVED if f"observed {name}" in names]
    for name, each in zip(observed, tables(observed).updates(some_cautious=False, observe=True), strict=True):
        yield f"observed {name}", each
    measured = [name for name in MEASURED if f"squares {name}" in names]
    measuring = tables(measured)
    *squares, settle = measuring.measure(1.0, None)
    for name, each in zip(measured, squares, strict=True):
        yield f"squares {name}", each
    yield "settle", settle
    recipes = [Recipe(0, 1e-3, 0.9, 0.999, 1e-8, 1e-2, False, 1)]
    kept = measuring.launcher.empty(KEPT)

    def deciding(bound, exchange):
        verdict = DeviceVerdict(1.0, None, bound, False, False, exchange, None)
        return measuring.decide(verdict, recipes, kept, 0, ToldMemory()).decide

    yield "decide measured", deciding(1.0, None)
    yield "decide together", deciding(None, lambda words: words)
    yield "decide", deciding(None, None)


def opcodes(ptx, target, folder):
    """What ptxas makes of PTX without division and square root, where it may fuse."""
    from triton import knobs

    source, binary = folder / "kernel.ptx", folder / "kernel.cubin"
    ptx = re.sub(r"\bdiv\.rn\.(f32|f64)\b", r"max.\1", ptx)
    source.write_text(re.sub(r"\bsqrt\.rn\.(f32|f64)\b", r"abs.\1", ptx))
    arch = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    subprocess.run([knobs.nvidia.ptxas.path, "--fmad=true", f"--gpu-name={arch}", source, "-o", binary], check=True)
    command = [knobs.nvidia.nvdisasm.path, "-ndf", binary]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", text)


def resources(cubin, folder):
    """What the driver is told that a kernel uses, by name."""
    from triton import knobs

    binary = folder / "kernel.cubin"
    binary.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", binary]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def compile_all(target, folder):
    """Compile for a target; write down what came out."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(Machine(GPUTarget(*TARGETS[target])))
    found = {}
    for name, each in launches(WANTED[target]):
        compiled = each.prepared
        found[name] = {
            "kind": each.kind,
            "threads": compiled.metadata.num_warps * compiled.metadata.target.warp_size,
            "fuses": compiled.metadata.enable_fp_fusion,
        }
        if target in NVIDIA:
            ptx = compiled.asm["ptx"]
            found[name] |= {"ptx": ptx, "uses": resources(compiled.asm["cubin"], folder)}
            if name in ASSEMBLED:
                found[name]["opcodes"] = opcodes(ptx, target, folder)
        else:
            found[name] |= {"llir": compiled.asm["llir"], "amdgcn": compiled.asm["amdgcn"]}
    (folder / "found.json").write_text(json.dumps(found))


# What is asserted of what came out


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """By target and name, what the kernels were compiled to."""
    running = {}
    for target in TARGETS:
        folder = tmp_path_factory.mktemp(target)
        environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
        command = [sys.executable, "-W", "error", __file__, target, str(folder)]
        with (folder / "log").open("w") as log:
            running[target] = (folder, subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        end = time.monotonic() + LIMIT
        codes = {target: process.wait(end - time.monotonic()) for target, (_, process) in running.items()}
    finally:
        for _, process in running.values():
            process.kill()
            process.wait()
    for target, (folder, _) in running.items():
        assert codes[target] == 0, f"{target}:\n{(folder / 'log').read_text()}"
    return {target: json.loads((folder / "found.json").read_text()) for target, (folder, _) in running.items()}


def each_of(names):
    """Parametrize a test with the targets of NVIDIA, and those of these names that are compiled for each."""
    found = [(target, name) for target in NVIDIA for name in WANTED[target] if name in names]
    return pytest.mark.parametrize(("target", "name"), found)


@functools.cache
def instructions(ptx):
    """Each (whether on a condition, name) of a text in PTX."""
    found = re.findall(r"^\s*(@!?%p\d+\s+)?([a-z]\w*(?:\.[\w:]+)+)(?=\s)", ptx, re.MULTILINE)
    return Counter((bool(condition), name) for condition, name in found)


def test_everything_is_compiled(compiled):
    assert {target: set(found) for target, found in compiled.items()} == {
        target: set(names) for target, names in WANTED.items()
    }
    assert all(not each["fuses"] for found in compiled.values() for each in found.values())


ROUNDED = {f"{name}.rn.{kind}" for name in ("add", "sub", "mul", "div", "sqrt") for kind in ("f32", "f64")}
COMPUTES = {"add", "sub", "mul", "div", "sqrt", "fma", "mad", "rcp", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh"}
REAL = re.compile(r"b?f(16|32|64)(x2)?|tf32|e\dm\d(x2)?")


@each_of(NAMES)
def test_every_operation_rounds_once_to_nearest(target, name, compiled):
    ptx = compiled[target][name]["ptx"]
    computing, narrowing = set(), set()
    for _, instruction in instructions(ptx):
        operation, *rest = instruction.split(".")
        if operation in COMPUTES and REAL.fullmatch(rest[-1]):
            computing.add(instruction)
        elif operation == "cvt" and REAL.fullmatch(rest[-1]) and REAL.fullmatch(rest[-2]):
            narrowing.add(instruction)
    assert computing <= ROUNDED
    assert narrowing <= {
        "cvt.f64.f32",
        "cvt.f32.f16",
        "cvt.f64.f16",
        "cvt.rn.f32.f64",
        "cvt.rn.f16.f32",
        "cvt.rn.f16x2.f32",
    }
    assert not re.search(r"\.(ftz|approx|full|sat)\b|\bfma\.r|\bcall\b", ptx)


@each_of(UPDATES)
def test_an_update_divides_and_takes_roots(target, name, compiled):
    """What the test before looks for is there: an element's division and its root, on both ways through a tile."""
    real = "f64" if name.startswith("float64") else "f32"
    found = instructions(compiled[target][name]["ptx"])
    each = tile_of(compiled[target][name]) * (1 if "odd" in name else 2)
    assert found[False, f"sqrt.rn.{real}"] == each
    assert found[False, f"div.rn.{real}"] >= each
    assert found[False, f"mul.rn.{real}"] >= 7 * each


def test_options_that_are_off_have_no_instructions(compiled):
    """Comparing signs is for cautious decay, mixing random bits for an average."""
    found = {name: instructions(each["ptx"]) for name, each in compiled["sm_90"].items()}
    compares = {name for name, each in found.items() if each[False, "setp.gt.f32"] and each[False, "setp.lt.f32"]}
    mixes = {name for name, each in found.items() if each[False, "xor.b64"]}
    assert {"float32", "float32 ema", "float32 cautious"} & compares == {"float32 cautious"}
    assert {"float32", "float32 ema", "float32 cautious"} & mixes == {"float32 ema"}


@each_of(ASSEMBLED)
def test_nothing_is_fused_but_within_division_and_root(target, name, compiled):
    found = Counter(compiled[target][name]["opcodes"])
    families = Counter(opcode.split(".")[0] for opcode in compiled[target][name]["opcodes"])
    assert families["LDG"] > 0
    assert families["DMUL" if name in ("float64", "squares float64", "decide measured") else "FMUL"] > 0
    assert not {"FFMA", "DFMA", "FFMA2", "FFMA32I", "HFMA"} & set(families)
    # Division of integers takes an estimate, with F2I, from numbers that are never subnormal.
    assert not [opcode for opcode in found if "FTZ" in opcode.split(".") and not opcode.startswith("F2I")]


@each_of(NAMES)
def test_registers_suffice(target, name, compiled):
    """Nothing is spilled."""
    uses = compiled[target][name]["uses"]
    assert uses["STACK"] == uses["LOCAL"] == 0
    assert 0 < uses["REG"] <= 255
    assert uses["SHARED"] <= 8192
    assert not re.search(r"\.local\b|__local_depot", compiled[target][name]["ptx"])


def tile_of(found):
    """How many elements a thread updates at once."""
    *_, tile, _ = found["kind"]
    return tile // found["threads"]


def operands(name):
    """The sizes of an element of each tensor that is read, and of each that is written."""
    words = name.removeprefix("observed ").split()
    row = row_of(" ".join(words))
    own = SIZES[words[0].split("+")[0]]
    real = SIZES[TYPES[row.compute]]
    param = {"bfloat16+residual": [2, 2], "float16+master": [2, 4]}.get(words[0], [own])
    kept = param + 2 * [(real, 2, 1)[row.moments]] + [real] * (row.amsgrad + row.ema)
    return [*kept, SIZES[TYPES[row.gradient]]], kept


def accesses(ptx, operation):
    """How often memory is read or written without a condition: by bytes of an access, and whether it is of several."""
    found = Counter()
    for (condition, name), count in instructions(ptx).items():
        access = re.fullmatch(rf"{operation}\.global(?:\.v(\d))?\.b(\d+)", name)
        if access is None:
            assert not name.startswith(f"{operation}.global")
        elif not condition:
            several, bits = int(access[1] or 1), int(access[2])
            found[several * bits // 8, several > 1] += count
    return found


WIDE = [
    name
    for name in [*UPDATES, *(f"observed {name}" for name in OBSERVED)]
    if not {"strided", "narrow", "odd"} & set(name.split())
]


@each_of(WIDE)
def test_memory_is_read_and_written_16_bytes_at_a_time(target, name, compiled):
    """Or as many as a thread's elements have, if they are fewer."""
    each = tile_of(compiled[target][name])
    for operation, sizes in zip(("ld", "st"), operands(name), strict=True):
        expected = Counter()
        for size in sizes:
            expected[min(16, each * size)] += max(1, each * size // 16)
        found = accesses(compiled[target][name]["ptx"], operation)
        assert (found[16, True], found[8, True]) == (expected[16], expected[8])
        assert found[4, False] >= expected[4]  # and the scales of blocks
        assert not {size for size, _ in found} & {1, 2}


@each_of([f"squares {name}" for name in MEASURED if not {"strided", "narrow"} & set(name.split())])
def test_squares_are_read_16_bytes_at_a_time(target, name, compiled):
    found = accesses(compiled[target][name]["ptx"], "ld")
    assert found[16, True] >= 2


@each_of(
    [
        name
        for name in NAMES
        if name not in WIDE and ("squares" not in name or {"strided", "narrow"} & set(name.split()))
    ]
)
def test_nothing_is_said_to_be_aligned_that_may_not_be(target, name, compiled):
    """Elsewhere memory is read one element at a time: nothing is known of addresses but what elements need.

    Tables come at addresses that are multiples of 16 or not, and a kernel that was compiled for one is used for all.
    """
    found = instructions(compiled[target][name]["ptx"])
    several = sum(count for (_, each), count in found.items() if re.match(r"(ld|st)\.global\.v", each))
    # Codes are not strided. The sums that are settled come from no table: they lie at the beginning of their memory.
    assert several == 0 if name not in ("float32 8bit strided ema", "settle") else several <= 64


# AMD


@pytest.mark.parametrize("name", WANTED["gfx942"])
def test_amd(name, compiled):
    found = compiled["gfx942"][name]
    assert not re.search(r"@llvm\.fma|!fpmath|\bf\w+ (contract|fast|reassoc|arcp|afn|nnan|ninf|nsz)\b", found["llir"])
    assert not re.search(r"@llvm\.amdgcn\.(rcp|rsq|sqrt|fdiv|div)", found["llir"])
    text = found["amdgcn"]
    for mode in ("32", "16_64"):
        assert re.search(rf"\.amdhsa_float_denorm_mode_{mode} 3\b", text)  # subnormals are kept
    assert re.search(r"\.vgpr_spill_count: +0\b", text)
    assert re.search(r"\.private_segment_fixed_size: +0\b", text)
    if name in AMD:
        of = Counter(re.sub(r"_e(32|64)$", "", each) for each in re.findall(r"^\s+(v_\w*f32\w*)", text, re.MULTILINE))
        fused = sum(count for each, count in of.items() if re.match(r"v_(pk_)?(fma|mad|mac)", each))
        assert fused == 5 * of["v_div_fixup_f32"] + 2 * of["v_sqrt_f32"] > 0


if __name__ == "__main__":
    compile_all(sys.argv[1], Path(sys.argv[2]))
