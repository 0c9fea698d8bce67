"""Build the CPU engine for arm64 and run tests on it, emulated, on another Debian or Ubuntu machine.

``python tools/arm64.py tests/test_engine_bits.py --quick`` after ``apt-get install qemu-user-static
g++-aarch64-linux-gnu``, with the project's environment, whose Python is the distribution's version. Arguments go to
pytest; without any, ``tests/smoke.py`` runs. ``CXX=clang++`` compiles with Clang. The first run puts the distribution's
Python and PyPI's wheels for arm64 into ``build/arm64``: 0.7 GB to download, 2 GB unpacked. On a busy machine hypothesis
may fail a test because its input came too slowly: that is the emulator, run the test again alone.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from importlib.metadata import distribution, version
from pathlib import Path

HERE = Path(__file__).parent.parent
BASE = HERE / "build" / "arm64"
SYSTEM, WHEELS, SITE, PACKAGE = BASE / "system", BASE / "wheels", BASE / "site", BASE / "package"
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
TARGET = "aarch64-linux-gnu"
CORES = 2


def run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout


def unpack_python() -> None:
    """The distribution's arm64 packages, by an apt that knows nothing of this system's own."""
    lists, cache, status = BASE / "apt/lists", BASE / "apt/cache", BASE / "apt/status"
    for folder in (lists / "partial", cache / "archives/partial"):
        folder.mkdir(parents=True, exist_ok=True)
    status.touch()
    of = {"Architecture": "arm64", "Architectures::": "arm64"}
    options = [f"-oAPT::{key}={value}" for key, value in of.items()]
    options += [f"-oDir::State::lists={lists}", f"-oDir::State::status={status}", f"-oDir::Cache={cache}"]
    run("apt-get", *options, "-qq", "update")
    packages = [PYTHON, f"lib{PYTHON}-dev", "libstdc++6", "libgomp1"]
    run("apt-get", *options, "-qq", "-y", "--no-install-recommends", "--download-only", "install", *packages)
    for package in cache.glob("archives/*.deb"):
        run("dpkg", "-x", package, SYSTEM)


def unpack_wheels() -> None:
    """What has compiled parts; everything else is the environment's."""
    packages = [f"{name}=={version(name).split('+')[0]}" for name in ("torch", "numpy", "triton", "hypothesis")]
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (28, 27, 17)]
    options = ["--no-deps", "--only-binary=:all:", "--implementation=cp", *platforms, "-d", WHEELS]
    run(sys.executable, "-m", "pip", "download", *options, *packages)
    for wheel in WHEELS.glob("*.whl"):
        shutil.unpack_archive(wheel, SITE, "zip")


def stand_in_for_cuda() -> None:
    """PyPI's torch wants gigabytes of NVIDIA's libraries to be imported, and calls nothing in them without a GPU."""
    folder = SITE / "torch/lib"
    defined, wanted, missing = set(), defaultdict(set), set()
    of_system = [path for place in ("lib", "usr/lib") for path in (SYSTEM / place / TARGET).glob("*.so.*")]
    for library in [*folder.glob("*.so*"), *of_system]:
        for line in run(f"{TARGET}-nm", "-D", "--with-symbol-versions", library).splitlines():
            kind, name = line.split()[-2:]
            name, _, of = name.replace("@@", "@").partition("@")
            if kind != "U":
                defined.add(name)
            elif library.parent == folder:
                wanted[of].add(name)
        if library.parent == folder:
            missing |= set(re.findall(r"NEEDED\s+(\S+)", run(f"{TARGET}-objdump", "-p", library)))
    present = {path.name for path in [*folder.iterdir(), *of_system]}
    source, versions, library = BASE / "cuda.s", BASE / "cuda.map", folder / "libcuda_stand_in.so"
    names = sorted(set().union(*wanted.values()) - defined)
    no_device = "\tmov w0, #100\n\tret\n"
    source.write_text("".join(f".globl {name}\n.type {name}, %function\n{name}:\n" for name in names) + no_device)
    nodes = {of: sorted(symbols - defined) for of, symbols in wanted.items() if of and symbols - defined}
    versions.write_text("".join(f"{of} {{ {'; '.join(symbols)}; }};\n" for of, symbols in nodes.items()))
    run(f"{TARGET}-gcc", "-shared", "-nostdlib", f"-Wl,--version-script={versions}", source, "-o", library)
    for name in missing - present:
        (folder / name).symlink_to(library.name)


def describe_cpu() -> None:
    """What torch's libraries read of an arm64 machine, instead of this one's: two Neoverse N1."""
    system = SYSTEM / "sys/devices/system/cpu"
    info = (
        "processor\t: {}\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm\n"
    )
    info += "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\nCPU revision\t: 1\n\n"
    (SYSTEM / "proc").mkdir(exist_ok=True)
    (SYSTEM / "proc/cpuinfo").write_text("".join(info.format(core) for core in range(CORES)))
    for core in range(CORES):
        found = {"regs/identification/midr_el1": "0x00000000413fd0c1"}
        found |= {"topology/physical_package_id": "0", "topology/core_siblings_list": f"0-{CORES - 1}"}
        for name, value in found.items():
            path = system / f"cpu{core}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(value + "\n")
    for name in ("possible", "present", "online"):
        (system / name).write_text(f"0-{CORES - 1}\n")


def build() -> None:
    """The extension and the package around it, as on an arm64 machine."""
    compiler = os.environ.get("CXX", f"{TARGET}-g++")
    folder = BASE / Path(compiler).name
    includes = SYSTEM / "usr/include"
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_COMPILE_WARNING_AS_ERROR": "ON",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": compiler,
        "CMAKE_CXX_COMPILER_TARGET": TARGET,  # Clang's
        "CMAKE_CXX_FLAGS": f"-isystem {includes}",
        "Python_EXECUTABLE": sys.executable,
        "Python_INCLUDE_DIR": includes / PYTHON,
        "nanobind_DIR": run(sys.executable, "-m", "nanobind", "--cmake_dir").strip(),
    }
    run("cmake", "-G", "Ninja", "-S", HERE, "-B", folder, *[f"-D{name}={value}" for name, value in options.items()])
    run("cmake", "--build", folder)
    shutil.rmtree(PACKAGE, ignore_errors=True)
    shutil.copytree(HERE / "src", PACKAGE, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (extension,) = folder.glob("_cpu*.so")
    shutil.copy(
        extension, PACKAGE / f"lucid/engine/_cpu.cpython-{sysconfig.get_config_var('py_version_nodot')}-{TARGET}.so"
    )


def main() -> int:
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    distribution("lucid-optim")  # whose environment this is
    done = BASE / "unpacked"
    if not done.exists():
        unpack_python()
        unpack_wheels()
        stand_in_for_cuda()
        describe_cpu()
        done.touch()
    build()
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", "-o", "timeout=0", *sys.argv[1:]]
    if len(sys.argv) == 1:
        arguments = ["tests/smoke.py"]
    folders = [PACKAGE, SITE, sysconfig.get_path("purelib")]
    environment = {
        "PYTHONPATH": ":".join(map(str, folders)),
        "PYTHONHOME": str(SYSTEM / "usr"),
        "PYTHONPYCACHEPREFIX": str(BASE / "pycache"),
        "OMP_NUM_THREADS": "1",
    }
    libraries = f"LD_LIBRARY_PATH=/lib/{TARGET}:/usr/lib/{TARGET}"
    emulator = ["qemu-aarch64-static", "-cpu", "neoverse-n1", "-E", libraries, "-L", str(SYSTEM)]
    command = [*emulator, str(SYSTEM / "usr/bin" / PYTHON), *arguments]
    return subprocess.run(command, cwd=HERE, env={**os.environ, **environment}).returncode


if __name__ == "__main__":
    sys.exit(main())
