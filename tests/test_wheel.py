"""A wheel holds the right files, and works beside a user's own packages that are named as our folders are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.videos import Recipe, write_video

ROOT = Path(__file__).parents[1]
ROOMS = ("models", "pipeline", "jobs", "schemas")
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist", "demo-out", "shared"
)
BUILD = """
import sys
from setuptools import build_meta
print(build_meta.build_sdist(sys.argv[1]))
"""

WHERE = """
import sys
import models, pipeline, jobs, schemas
import vidshard.jobs.cli, vidshard.models.codebook_use, vidshard.pipeline.video.sampling, vidshard.schemas.video

def files():
    return {name: sys.modules[name].__file__ for name in (
        "models", "pipeline", "jobs", "schemas", "vidshard",
        "vidshard.jobs", "vidshard.models", "vidshard.pipeline", "vidshard.schemas",
    )}
"""

CHILD = """
import json
from models.where import files
from vidshard.pipeline.video.sandbox import DecodeSandbox
with DecodeSandbox() as sandbox:
    print(json.dumps([files(), sandbox.run(files, timeout_seconds=60)]))
"""

RUN = """
import sys
import models.where
import vidshard

if __name__ == "__main__":
    small = {"tokenizer": "tiny", "fps": 25, "frames": 17, "size": 64}
    run = vidshard.TokenizeRun(inputs=["clip.mp4"], out="through-ray", **small)
    summary = vidshard.tokenize(run)
    output = vidshard.open_output("through-ray")
    [clip] = output.clips()
    print("ray" in sys.modules, summary.written.num_clips, output.reconstruct(clip).shape)
"""


def call(*command: str | Path, cwd: Path) -> str:
    """Run a command without what would lead it back to this checkout; gives its standard output."""
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV") and k[:4] != "RAY_"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=outside, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A virtual environment that finds our dependencies in the one that runs the tests, but not this checkout."""

    bin: Path
    site_packages: Path

    @classmethod
    def create(cls, folder: Path) -> Environment:
        call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        site_packages = folder / "lib" / version / "site-packages"
        # A folder that a .pth file adds has its own .pth files left alone: no editable install reaches us from there.
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (site_packages / "dependencies.pth").write_text("\n".join(sorted(paths)))
        return cls(bin=folder / "bin", site_packages=site_packages)

    def install(self, *what: str | Path, cwd: Path) -> None:
        """Install without an index, dependencies or a fresh environment to build in."""
        python = self.bin / "python"
        offline = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
        call(sys.executable, "-m", "pip", "--python", python, "install", *offline, "--force-reinstall", *what, cwd=cwd)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout, so that building leaves nothing behind and finds nothing built before."""
    folder = tmp_path_factory.mktemp("checkout") / "vidshard"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=LEFT_OUT)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from the source distribution alone."""
    folder = tmp_path_factory.mktemp("dist")
    name = call(sys.executable, "-c", BUILD, folder, cwd=checkout).split()[-1]
    offline = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    call(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", folder, folder / name, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel in it."""
    environment = Environment.create(tmp_path_factory.mktemp("environment") / "venv")
    environment.install(wheel, cwd=wheel.parent)
    return environment


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own project, with packages that are named as our folders are."""
    folder = tmp_path_factory.mktemp("project")
    for room in ROOMS:
        (folder / room).mkdir()
        (folder / room / "__init__.py").write_text("")
    (folder / "models" / "where.py").write_text(WHERE)
    write_video(folder / "clip.mp4", Recipe(num_frames=17))
    return folder


def test_a_wheel_holds_real_files_under_one_import_name_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert all((entry.external_attr >> 16) & 0o170000 in (0, 0o100000) for entry in archive.infolist())
        assert archive.read("vidshard/pipeline/plan.py") == (ROOT / "pipeline" / "plan.py").read_bytes()
        for weights in (ROOT / "models" / "shipped").iterdir():
            assert archive.read(f"vidshard/models/shipped/{weights.name}") == weights.read_bytes()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"vidshard"}
    assert "vidshard/py.typed" in names
    ours = {f"vidshard/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == ours | {"vidshard/__init__.py"}


def test_an_install_puts_nothing_but_vidshard_into_site_packages(installed: Environment) -> None:
    theirs = {"dependencies.pth", "__pycache__"}
    ours = {path.name for path in installed.site_packages.iterdir()} - theirs
    assert {name for name in ours if not name.endswith(".dist-info")} == {"vidshard"}


def test_importing_vidshard_loads_neither_torch_nor_ray(installed: Environment, project: Path) -> None:
    code = (
        "import sys, vidshard; print(vidshard.__file__, *{'torch', 'ray', 'av', 'pyarrow', 'numpy'} & {*sys.modules})"
    )
    found = call(installed.bin / "python", "-c", code, cwd=project).split()
    assert found == [str(installed.site_packages / "vidshard" / "__init__.py")]


def test_the_sandbox_child_finds_the_users_packages_and_ours(installed: Environment, project: Path) -> None:
    here, child = json.loads(call(installed.bin / "python", "-c", CHILD, cwd=project))
    assert here == child
    for name, file in child.items():
        home = installed.site_packages if name.startswith("vidshard") else project
        assert file == str(home.joinpath(*name.split("."), "__init__.py"))


def test_the_command_tokenizes_beside_packages_of_the_same_names(installed: Environment, project: Path) -> None:
    settings = ("--tokenizer", "tiny", "--fps", "25", "--frames", "17", "--size", "64")
    call(installed.bin / "vidshard", "tokenize", "clip.mp4", "--out", "tokens", "--local", *settings, cwd=project)
    assert "clip.mp4" in call(installed.bin / "vidshard", "inspect", "tokens", cwd=project)


def test_a_script_tokenizes_through_ray_beside_packages_of_the_same_names(
    installed: Environment, project: Path
) -> None:
    (project / "run.py").write_text(RUN)
    said = call(installed.bin / "python", "run.py", cwd=project)
    assert said.splitlines()[-1] == "True 1 (17, 64, 64, 3)"


@pytest.mark.slow  # every test of this suite runs in an editable install; this one is beside foreign packages
def test_an_editable_install_uses_the_checkout_under_the_same_name(
    checkout: Path, project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    environment = Environment.create(tmp_path_factory.mktemp("environment") / "venv")
    environment.install("--editable", checkout, cwd=checkout)
    code = "import json; from models.where import files; print(json.dumps(files()))"
    files = json.loads(call(environment.bin / "python", "-c", code, cwd=project))
    for name, file in files.items():
        home = checkout if name.startswith("vidshard") else project
        assert Path(file) == home.joinpath(*name.split("."), "__init__.py")
    elsewhere = f"from importlib.util import find_spec; print([room for room in {ROOMS} if find_spec(room)])"
    assert call(environment.bin / "python", "-c", elsewhere, cwd=environment.bin).strip() == "[]"
