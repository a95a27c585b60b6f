"""Autoencoders of diffusers by name: a repository of the Hub from a server of our own, folders, and lazy imports."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed (pip install -e '.[dev]')")

from tests.support.file_hub import NEW, OLD, Hub, run
from tests.support.markdown import ROOT
from tests.support.vae_configs import CONFIGS, config_of, write_vae

FIND = """
import json, sys
from vidshard.pipeline.named_tokenizer import find_tokenizer
from vidshard.pipeline.tokenizer_source import TokenizerSource
from vidshard.schemas.errors import UserError
for place in sys.argv[1:]:
    try:
        found = find_tokenizer(f"diffusers:{place}")
        source = TokenizerSource(config=found.config, weights=found.weights).with_digest()
        print(json.dumps([found.name, found.weights, found.config.name, source.sha256]))
    except UserError as error:
        print(json.dumps(str(error)))
"""
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def repository(hub: Hub, tmp_path: Path) -> Hub:
    """A pipeline's repository, whose root describes something else, and one that moved on."""
    folder = write_vae(tmp_path / "files", "wan-2.1")
    for commit in (OLD, NEW):
        hub.files["owner/wan", commit, "config.json"] = json.dumps({"_class_name": "WanModel"}).encode()
        for name in ("config.json", WEIGHTS):
            hub.files["owner/wan", commit, f"vae/{name}"] = (folder / name).read_bytes()
    changed = json.loads(hub.files["owner/wan", NEW, "vae/config.json"]) | {"latents_mean": [9.0, 9.0, 9.0]}
    hub.files["owner/wan", NEW, "vae/config.json"] = json.dumps(changed).encode()
    hub.files["owner/image", OLD, "config.json"] = json.dumps(CONFIGS["taesd"]).encode()
    hub.files["owner/none", OLD, "README.md"] = b"nothing"
    hub.files["owner/other", OLD, "config.json"] = b'{"_class_name": "WanModel"}'
    return hub


def test_a_repository_gives_config_and_weights_of_one_commit(repository: Hub, tmp_path: Path) -> None:
    places = [
        "owner/wan",
        "owner/wan/vae",
        f"owner/wan@{NEW}/vae",
        "owner/none",
        "owner/other",
        "owner/gone",
        "owner/image",
    ]
    result = run(repository, tmp_path / "home", sys.executable, "-c", FIND, *places)
    assert result.returncode == 0, result.stderr
    root, folder, new, none, other, gone, image = map(json.loads, result.stdout.splitlines())
    pinned = f"owner/wan@{OLD}/vae"
    assert root == folder
    assert root[:3] == [f"diffusers:{pinned}", f"hf://{pinned}/{WEIGHTS}", config_of("wan-2.1").name]
    assert new[:2] == [f"diffusers:owner/wan@{NEW}/vae", f"hf://owner/wan@{NEW}/vae/{WEIGHTS}"]
    assert new[2] != root[2]
    assert new[3] == root[3]
    assert "owner/none has no file config.json" in none
    assert "'WanModel' is not a class that is taken" in other
    assert "there is no repository owner/gone" in gone
    assert f"owner/image has no file {WEIGHTS}" in image


def test_diffusers_is_imported_in_one_module_by_functions_alone() -> None:
    found = {}
    for room in ("schemas", "models", "pipeline", "jobs", "vidshard/__init__.py"):
        place = ROOT / room
        for path in [place] if place.is_file() else place.rglob("*.py"):
            text = path.read_text()
            if "diffusers" not in text:
                continue
            tree = ast.parse(text)
            for node in ast.walk(tree):
                names = (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
                if any(name.split(".")[0] == "diffusers" for name in names):
                    found[str(path.relative_to(ROOT))] = node in tree.body
    assert found == {"models/diffusers_vae/library.py": False}
