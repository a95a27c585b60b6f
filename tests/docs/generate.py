"""Tables of the documentation that are rendered from the code: ``make docs`` rewrites them.

A page marks each with ``<!-- generated: NAME -->`` and ``<!-- end of NAME -->``. `test_generated_tables_are_current`
compares the pages with what stands here. A renderer gets the table that is there now, because the meaning of a
column is written by hand while its name and type come from the schema.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from pydantic import BaseModel

from tests.support.markdown import ROOT, project_pages
from vidshard.jobs.runtime.events import EVENTS
from vidshard.jobs.runtime.settings import default_of, value_of
from vidshard.jobs.training.presets import TRAININGS
from vidshard.jobs.training.sources import SOURCES
from vidshard.models.diffusers_vae.classes import CLASSES, EXCLUDED
from vidshard.models.tokenizer import PRESETS
from vidshard.models.weights import SHIPPED, count_parameters
from vidshard.schemas.fields import Identity, When, With, Without, setting_of
from vidshard.schemas.rejections import REMEDIES, Reason
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.tokens import CLIP_FIELDS, REJECT_SCHEMA
from vidshard.schemas.training import RunSettings, StageConfig

ROOMS = ("schemas", "models", "pipeline", "jobs")
MISSING = "(say what it means)"
"""Stands where a column has no meaning yet; no page may hold it."""


def rewrite(text: str) -> str:
    """The page with every generated block rendered anew.

    Raises:
        KeyError: a block has a name that no renderer has.
    """

    def render(match: re.Match[str]) -> str:
        name = match["name"]
        table = RENDERERS[name](match["old"]).strip()
        return f"<!-- generated: {name} -->\n{table}\n<!-- end of {name} -->"

    return re.sub(r"(?s)<!-- generated: (?P<name>[^>]+?) -->\n(?P<old>.*?)\s*<!-- end of (?P=name) -->", render, text)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _settings(*models: type[BaseModel], with_identity: bool) -> str:
    header = ["flag", "value", "default", *(["identity"] if with_identity else []), "meaning"]
    sections: dict[str, list[list[str]]] = {}
    for model in models:
        for name, field in model.model_fields.items():
            record = setting_of(field)
            flag = f"`--{name.replace('_', '-')}`" if name != "inputs" else "`VIDEOS`"
            identity = [_identity(record.identity)] if with_identity else []
            value = "" if name == "inputs" else (value_of(field) or "").replace("|", ", ")
            default = "required" if field.is_required() else default_of(field, field.default)
            row = [flag, value, default, *identity, _escaped(field.description or "")]
            sections.setdefault(record.section, []).append(row)
    return "\n\n".join(f"**{name}**\n\n" + _table(header, rows) for name, rows in sections.items())


def _identity(identity: Identity | None) -> str:
    match identity:
        case With(other=other):
            return f"with `--{other.replace('_', '-')}`"
        case Without(other=other):
            return f"without `--{other.replace('_', '-')}`"
        case When(kind=kind):
            return f"if {kind}"
        case str():
            return {"when set": "if set", "resolved": "as resolved"}[identity]
        case _:
            return "yes" if identity else ""


def _escaped(text: str) -> str:
    return re.sub(r"(?<![`\w])(--[a-z][a-z0-9-]+)", r"`\1`", text)


def tokenize_settings(_: str) -> str:
    """Every setting of ``vidshard tokenize``, by section."""
    return _settings(TokenizeRun, with_identity=True)


def train_settings(_: str) -> str:
    """Every setting of ``vidshard train``, by section, with the defaults of the models."""
    return _settings(RunSettings, StageConfig, with_identity=False)


def training_presets(_: str) -> str:
    """Settings of each preset."""
    rows = []
    for name, preset in TRAININGS.items():
        run = preset(["videos"], "out")
        for stage, config in run.stages.items():
            size = "x".join(map(str, config.size))
            rows.append(
                [
                    f"`{name}`",
                    str(run.tokenizer),
                    stage,
                    config.trainable,
                    f"{config.frames}x{size} at {config.fps} fps",
                    f"{config.steps:,}",
                    str(config.batch_size),
                    f"{config.learning_rate:g}",
                    config.precision,
                ]
            )
    header = ["preset", "tokenizer", "stage", "trained", "clip", "steps", "batch size", "learning rate", "precision"]
    return _table(header, rows)


def training_sources(_: str) -> str:
    """Value and source of each setting in the presets that follow a publication."""
    rows = []
    for name in StageConfig.model_fields:
        cells = []
        for sources in SOURCES.values():
            source = sources[name]
            cells.append(f"{_shown(source.value)} ({source.kind}{f': {source.note}' if source.note else ''})")
        rows.append([f"`{name}`", *cells])
    return _table(["setting", *(f"`{preset}`" for preset in SOURCES)], rows)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ("x" if all(isinstance(part, int) for part in value) else ",").join(map(str, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def tokenizers(_: str) -> str:
    """Every preset: its compression, its codebook and what a clip becomes."""
    rows = []
    for config in PRESETS.values():
        clip = config.default_clip
        space = config.space_stride
        payload = config.payload(*clip)
        values = f"{config.codebook_size:,} tokens" if config.codebook_size else "latents"
        shape = ", ".join(f"{column.name} {'x'.join(map(str, column.shape))}" for column in payload)
        rows.append(
            [
                f"`{config.name}`",
                config.head_name.upper(),
                "yes" if config.is_causal else "no",
                "by part" if config.parts else f"{config.time_stride}x{space}x{space}",
                values,
                "x".join(map(str, clip)),
                shape,
                f"{config.compression_rate:.3%}",
                f"{count_parameters(config) / 1e6:.1f} M",
                "in the package" if config.name in SHIPPED else "",
            ]
        )
    header = ["name", "head", "causal", "compression", "values", "clip", "becomes", "rate", "weights", ""]
    return _table(header, rows)


def _columns(fields: list[pa.Field], old: str) -> str:
    meanings = {}
    for line in old.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if len(cells) == 4:
            meanings[cells[0].strip("`")] = cells[3]
    rows = [
        [f"`{f.name}`", str(f.type).split("<")[0], "yes" if f.nullable else "no", meanings.get(f.name, MISSING)]
        for f in fields
    ]
    return _table(["column", "type", "nullable", "meaning"], rows)


def clip_columns(old: str) -> str:
    """The columns of every shard."""
    return _columns(list(CLIP_FIELDS), old)


def reject_columns(old: str) -> str:
    """The columns of a list of rejections."""
    return _columns(list(REJECT_SCHEMA), old)


def reasons(_: str) -> str:
    """The closed list of reasons, from the enum's docstrings and the remedies."""
    body = ast.parse(inspect.getsource(Reason)).body[0]
    assert isinstance(body, ast.ClassDef)
    meaning: dict[str, str] = {}
    for member, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(member, ast.Assign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            target = member.targets[0]
            assert isinstance(target, ast.Name)
            meaning[Reason[target.id]] = " ".join(str(text.value.value).split())
    rows = [[f"`{reason}`", _escaped(meaning[reason]), _escaped(REMEDIES[reason])] for reason in Reason]
    return _table(["reason", "meaning", "remedy"], rows)


def _files() -> list[Path]:
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    return sorted(path for path in files if path.name != "__init__.py" and "__pycache__" not in path.parts)


def modules(_: str) -> str:
    """Every module and the first sentence of its docstring, room by room."""
    rows = []
    for path in _files():
        text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
        sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z`(\"])", text.replace("``", "`"))[0]
        rows.append([f"`{path.relative_to(ROOT)}`", re.sub(r":\w+:", "", sentence)])
    rows.sort(key=lambda row: (ROOMS.index(row[0].strip("`").split("/")[0]), row[0].count("/"), row[0]))
    return _table(["file", "what it holds"], rows)


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= named if all(map(_is_module, named)) else named | {node.module}
    return names


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.removeprefix("vidshard.").split("."))
    return name.startswith("vidshard.") and (path.is_dir() or path.with_suffix(".py").is_file())


def _room(path: Path) -> str:
    return str(path.parent.relative_to(ROOT))


def room_imports(_: str) -> str:
    """Imports between rooms; schemas/ and storage are left out because nearly all import them."""
    rooms = sorted({_room(path) for path in _files()})
    left_out = {"schemas", "pipeline/storage"}
    arrows: dict[str, set[str]] = {room: set() for room in rooms}
    for path in _files():
        for name in _imports(path):
            if not name.startswith("vidshard."):
                continue
            target = ROOT.joinpath(*name.split(".")[1:])
            while not target.is_dir():
                target = target.parent
            room = str(target.relative_to(ROOT))
            if room in rooms and room != _room(path) and room not in left_out:
                arrows[_room(path)].add(room)
    rows = [
        [f"`{room}/`", ", ".join(f"`{target}/`" for target in sorted(arrows[room])) or "nothing"]
        for room in rooms
        if room not in left_out
    ]
    return _table(["room", "imports"], rows)


def ray_files(_: str) -> str:
    """The files that import Ray."""
    found = [
        f"- `{path.relative_to(ROOT)}`"
        for path in _files()
        if any(name == "ray" or name.startswith("ray.") for name in _imports(path))
    ]
    return "\n".join(found)


def events(_: str) -> str:
    """Every event of ``--log-json``, and its fields."""
    rows = [
        [f"`{name}`", meaning, ". ".join(f"`{field}`: {text}" for field, text in fields.items())]
        for name, (meaning, fields) in EVENTS.items()
    ]
    return _table(["event", "meaning", "fields"], rows)


def autoencoders(_: str) -> str:
    """Classes of diffusers: clips that each takes, and why it does not encode streams."""
    rows = [
        [
            f"`{row.name}`",
            row.models,
            row.clips,
            "yes" if row.streams else f"no: {row.no_streams}",
            "yes" if row.has_logvar else "no",
        ]
        for row in CLASSES.values()
    ]
    rows += [[f"`{name}`", "", f"refused: {why}", "", ""] for name, why in EXCLUDED.items()]
    return _table(["class", "models", "clips, in frames", "`--continuous`", "`--keep-logvar`"], rows)


RENDERERS: dict[str, Callable[[str], str]] = {
    "settings of tokenize": tokenize_settings,
    "settings of train": train_settings,
    "training presets": training_presets,
    "sources of training presets": training_sources,
    "tokenizers": tokenizers,
    "autoencoders": autoencoders,
    "columns of a shard": clip_columns,
    "columns of a rejection": reject_columns,
    "reasons": reasons,
    "modules": modules,
    "imports of rooms": room_imports,
    "files that import Ray": ray_files,
    "events": events,
}


def main() -> int:
    """Rewrite the pages; print those that changed."""
    for page in project_pages():
        text = page.read_text()
        new = rewrite(text)
        if new != text:
            page.write_text(new)
            print(page.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
