"""The video library stands on its own: it imports the records of ``schemas`` and nothing else of vidshard."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vidshard.pipeline.storage
import vidshard.pipeline.video


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module or ""


@pytest.mark.parametrize(
    ("package", "allowed", "exceptions"),
    [
        (vidshard.pipeline.video, ("vidshard.pipeline.video.", "vidshard.schemas."), set()),
        # the place of the shipped weights; imported when one is asked for
        (vidshard.pipeline.storage, ("vidshard.pipeline.storage", "vidshard.schemas."), {"vidshard.models.weights"}),
    ],
    ids=["video", "storage"],
)
def test_the_room_imports_nothing_of_vidshard_but_schemas(
    package: object, allowed: tuple[str, ...], exceptions: set[str]
) -> None:
    [folder] = package.__path__  # type: ignore[attr-defined]
    files = sorted(Path(folder).glob("*.py"))
    assert len(files) > 5
    for path in files:
        for name in imports_of(path):
            if name.split(".")[0] == "vidshard" and name not in exceptions:
                assert name.startswith(allowed), f"{path.name} imports {name}"


def test_decoding_loads_neither_torch_nor_ray_nor_fsspec() -> None:
    folder = Path(vidshard.pipeline.video.__path__[0])
    modules = [f"vidshard.pipeline.video.{path.stem}" for path in folder.glob("*.py") if path.stem != "__init__"]
    loaded = "{'torch', 'ray', 'fsspec'} & sys.modules.keys()"
    code = f"import sys, {', '.join(modules)}; sys.exit(', '.join({loaded}) or None)"
    process = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
