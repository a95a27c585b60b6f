"""Imports point one way: jobs, pipeline, models, schemas; no room and no module imports itself through others.

Tests import helpers of ``tests/support/`` and no other tests.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.support.markdown import ROOT

FLOORS = (
    "schemas",
    "models/libraries",
    "models/vidtok",
    "models/vidtwin",
    "models/diffusers_vae",
    "models",
    "models/training",
    "pipeline/storage",
    "pipeline/video",
    "pipeline/rows",
    "pipeline/output",
    "pipeline/inputs",
    "pipeline",
    "pipeline/reader",
    "pipeline/training_data",
    "pipeline/evaluation",
    "jobs/runtime",
    "jobs/report",
    "jobs/weights",
    "jobs/shards",
    "jobs/tokenization",
    "jobs/training",
    "jobs/evaluation",
    "jobs/export",
    "jobs/commands",
    "jobs",
)
"""Every folder with modules, the lowest first: a module imports from its own folder and from those below it."""

ROOMS = ("schemas", "models", "pipeline", "jobs")


def _modules() -> dict[str, Path]:
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts]
    return {_name(path): path for path in files}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("vidshard", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def _imports(path: Path, modules: dict[str, Path], *, inside_functions: bool) -> set[str]:
    """Modules of vidshard that a file imports: when it is loaded, or also inside functions and conditions."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree)) if inside_functions else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if names <= modules.keys() else names | {node.module}  # a folder, or names out of a module
    return found & modules.keys()


def test_modules_import_only_from_their_own_room_and_rooms_below_it() -> None:
    modules = _modules()
    rooms = {name: str(path.parent.relative_to(ROOT)) for name, path in modules.items()}
    missing = sorted(set(rooms.values()) - set(FLOORS))
    assert not missing, f"give {missing} a place in FLOORS"
    for name, path in modules.items():
        for target in _imports(path, modules, inside_functions=True):
            assert FLOORS.index(rooms[target]) <= FLOORS.index(rooms[name]), f"{name} imports {target}"


def test_no_module_imports_itself_through_others() -> None:
    modules = _modules()
    arrows = {name: _imports(path, modules, inside_functions=True) - {name} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " imports ".join((*above[above.index(name) :], name))
        if name not in done:
            for target in arrows[name]:
                visit(target, (*above, name))
            done.add(name)

    for name in modules:
        visit(name, ())


FAMILY_TAGS = ("vidtok", "vidtwin", "diffusers")
FAMILY_CLASSES = ("VidTok", "VidTokConfig", "VidTwin", "VidTwinConfig", "DiffusersVae", "DiffusersConfig")
FAMILY_FOLDERS = ("models/vidtok", "models/vidtwin", "models/diffusers_vae")


def _asks_for_a_family(path: Path) -> bool:
    """Whether a module compares a tag of a family, or asks whether something is a network or config of one."""
    for node in ast.walk(ast.parse(path.read_text())):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            parts = list(ast.walk(node.args[1]))
        elif isinstance(node, ast.MatchClass):
            parts = list(ast.walk(node.cls))
        if any(isinstance(part, ast.Constant) and part.value in FAMILY_TAGS for part in parts):
            return True
        if any(isinstance(part, ast.Name) and part.id in FAMILY_CLASSES for part in parts):
            return True
    return False


def test_the_places_that_ask_for_a_family_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    [section] = re.findall(r"^## Places that ask for a family$(.*?)^## ", page, re.DOTALL | re.MULTILINE)
    listed = set(re.findall(r"`((?:schemas|models|pipeline|jobs)/[\w/]+\.py)`", section))
    paths = [path.relative_to(ROOT) for path in _modules().values()]
    asking = {str(path) for path in paths if str(path.parent) not in FAMILY_FOLDERS and _asks_for_a_family(ROOT / path)}
    assert asking <= listed, "name them in docs/architecture.md, or take what they need from the entry of FAMILIES"
    assert listed <= {str(path) for path in paths}
    assert not {path for path in asking if path.startswith("models/training/")}, "the training loop asks for no family"


def test_decoding_a_video_imports_neither_ray_nor_torch() -> None:
    modules = _modules()
    reached: set[str] = set()
    wanted = [name for name in modules if name.startswith("vidshard.pipeline.video")]
    while wanted:
        name = wanted.pop()
        if name not in reached:
            reached.add(name)
            wanted += _imports(modules[name], modules, inside_functions=False)
    for name in reached:
        for node in ast.parse(modules[name].read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"ray", "torch"} & {name.split(".")[0] for name in names}, name


def test_no_test_file_imports_another_one() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        for node in nodes:
            module = getattr(node, "module", None) or ""
            names = [f"{module}.{alias.name}".lstrip(".") for alias in node.names]
            local = isinstance(node, ast.ImportFrom) and node.level > 0
            parts = [part for name in names if local or name.split(".")[0] == "tests" for part in name.split(".")]
            tests = [part for part in parts if part.startswith("test_") or part in ("conftest", "remake")]
            assert not tests, (
                f"{path.relative_to(ROOT)}:{node.lineno} imports {tests[0]}: move what is shared to tests/support/"
            )
