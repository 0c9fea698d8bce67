"""Guards what is handed out: the sdist, the wheel that is built from it alone, and that wheel where nothing else is."""

import email
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = f"lucid_optim-{PROJECT['version']}"
LEFT_OUT = re.compile(r"\.ci/|\.github/|\.gitignore$")  # of the sdist

pytestmark = pytest.mark.timeout(1200)  # the first test to ask for it waits for the compiler


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def files_of(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert all(member.isfile() for member in members)
    return {member.name.removeprefix(f"{NAME}/") for member in members}


def build(kind: str, source: Path, out: Path, *settings: str) -> Path:
    options = [f"--config-setting={setting}" for setting in settings]
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, *options, source)
    (found,) = out.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return found


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory):
    unpacked = tmp_path_factory.mktemp("unpacked")
    run("tar", "-xf", sdist, "-C", unpacked)
    warnings_are_errors = "cmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=ON"
    return build("wheel", unpacked / NAME, tmp_path_factory.mktemp("wheel"), warnings_are_errors)


def needed(requirements: list[str]) -> set[str]:
    """Return the names of the distributions that these need, and those, and so on."""
    names, left = set(), list(requirements)
    while left:
        requirement = Requirement(left.pop())
        if requirement.name in names or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        names.add(requirement.name)
        left += importlib.metadata.distribution(requirement.name).requires or []
    return names


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """The python of an environment that has the wheel and what the wheel says it needs, linked to from here."""
    home = tmp_path_factory.mktemp("installed") / "env"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for name in needed(PROJECT["dependencies"]):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():  # several may have parts in one folder
                (site / top).symlink_to(Path(distribution.locate_file(top)).resolve())
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel)
    return python


def test_the_sdist_is_the_checkout(sdist):
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")

    def listed(*arguments):
        return {
            name for name in run("git", "ls-files", "-z", *arguments).split("\0") if name and (ROOT / name).exists()
        }

    names = files_of(sdist)
    expected = {name for name in listed() if not LEFT_OUT.match(name)}
    being_written = listed("--others", "--exclude-standard")
    assert names - being_written == (expected | {"PKG-INFO"}) - being_written


def test_the_wheel_has_the_package_and_nothing_else(sdist, wheel):
    abi3 = sys.version_info >= (3, 12)
    suffix = ".abi3.so" if abi3 else sysconfig.get_config_var("EXT_SUFFIX")
    sources = {name.removeprefix("src/") for name in files_of(sdist) if name.startswith("src/lucid/")}
    info = {
        f"{NAME}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        tags = email.message_from_bytes(archive.read(f"{NAME}.dist-info/WHEEL")).get_all("Tag")
    assert "lucid/py.typed" in sources
    assert "lucid/engine/_cpu.pyi" in sources
    assert names == sources | info | {f"lucid/engine/_cpu{suffix}"}
    mine = f"cp3{sys.version_info.minor}"
    assert {tag.rsplit("-", 1)[0] for tag in tags} == {"cp312-abi3" if abi3 else f"{mine}-{mine}"}


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = Metadata.from_email(archive.read(f"{NAME}.dist-info/METADATA"), validate=True)
    assert metadata.name == "lucid-optim"
    assert str(metadata.version) == PROJECT["version"]
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description == (ROOT / "README.md").read_text()
    assert {str(r) for r in metadata.requires_dist if not r.marker} == {
        str(Requirement(r)) for r in PROJECT["dependencies"]
    }


def test_the_wheel_works_where_nothing_else_is(installed, tmp_path):
    others = (
        "import importlib.util as u; print([m for m in ('pytest', 'tqdm', 'nanobind', 'packaging') if u.find_spec(m)])"
    )
    assert run(installed, "-c", others, cwd=tmp_path).strip() == "[]"
    said = run(installed, "-W", "error", ROOT / "tests" / "smoke.py", cwd=tmp_path)
    assert str(installed.parents[1]) in said  # not of the checkout


def test_the_command_says_what_it_needs(installed, tmp_path):
    for command in ([installed, "-m", "lucid"], [installed.with_name("lucid")]):
        done = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True)
        needs = "lucid: the command needs typer: pip install 'lucid-optim[cli]'\n"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", needs)


def test_users_see_the_types(installed, tmp_path):
    users = tmp_path / "users.py"
    users.write_text(
        "import torch\n"
        "import lucid.optim as optim\n"
        "model = torch.nn.Linear(2, 1)\n"
        "adamw = optim.AdamW(model.parameters(), lr=1e-3, state_format='8bit', max_grad_norm=1.0)\n"
        "name: str = adamw.engine_for(model.weight)\n"
        "adamw.step()\n"
        "optim.AdamW(model.parameters(), state_format='4bit')  # type: ignore[arg-type]\n"
        "number: int = adamw.engine_for(model.weight)  # type: ignore[assignment]\n"
    )
    cache = tmp_path / "cache"
    run(
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--python-executable",
        installed,
        "--cache-dir",
        cache,
        users,
        cwd=tmp_path,
    )


def test_the_stub_is_what_the_bindings_say():
    run(sys.executable, "tools/stubs.py", "--check")
