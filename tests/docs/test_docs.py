"""The documentation does what it says: its commands parse or run, its code runs, its tables are those of the code.

CONTRIBUTING.md says what each kind of fence is checked for.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from tests.docs.generate import MISSING, rewrite
from tests.support.commands import CommandError, check_command, command_names, known_flags
from tests.support.markdown import (
    ROOT,
    Block,
    anchors_of,
    blocks_of,
    commands_of,
    inline_code_of,
    links_of,
    output_of,
    project_pages,
    sentences_of,
)
from vidshard.jobs.cli import vidshard
from vidshard.jobs.runtime.settings import resolve_settings
from vidshard.jobs.tokenization.demo import Sample, write_sample
from vidshard.jobs.training.settings import training_run
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.tokens import Provenance

PAGES = project_pages()
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
LANGUAGES = {"bash", "console", "python", "sql", "yaml", "text", "mermaid"}
CODE = ("schemas", "models", "pipeline", "jobs")
TOP_FOLDERS = (*CODE, "tests", "benchmarks", "deploy", "docs", "examples", "vidshard")

on_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(*languages: str, word: str | None = None, without: str | None = None) -> pytest.MarkDecorator:
    """Parametrizes a test over the blocks of some languages, by a word of their fence."""
    chosen = [b for b in BLOCKS if b.language in languages and (word is None or word in b.words)]
    return pytest.mark.parametrize("block", [b for b in chosen if without not in b.words], ids=lambda b: b.place)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages assume: ``clips/`` with two videos and a broken one, and the pages' YAML files."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "clips").mkdir()
    for number, name in enumerate(("first.mp4", "second.mp4")):
        sample = Sample(name=name, codec="libx264", width=320, height=240, rate=Fraction(30), seconds=2.0)
        write_sample(folder / "clips" / name, sample, seed=number)
    whole = (folder / "clips" / "first.mp4").read_bytes()
    (folder / "clips" / "broken.mp4").write_bytes(whole[: len(whole) // 2])
    for block in BLOCKS:
        if block.language == "yaml":
            (folder / block.words[0]).write_text(block.text + "\n")
    return folder


@pytest.fixture(scope="session")
def run_command(workspace: Path) -> Callable[[str], str]:
    """Runs a ``vidshard`` command in the workspace, once in a session; gives what it prints."""
    printed: dict[str, str] = {}

    def run(command: str) -> str:
        if command not in printed:
            program, *arguments = shlex.split(command, comments=True)
            assert program == "vidshard", f"only vidshard commands are run, got {command}"
            if arguments[0] == "tokenize" or (arguments[0] == "decode" and "--all" in arguments):
                arguments.append("--local")  # no Ray: the stages are the same callables
            before = Path.cwd()
            os.chdir(workspace)
            try:
                result = CliRunner().invoke(vidshard, arguments)
            finally:
                os.chdir(before)
            assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
            printed[command] = result.output
        return printed[command]

    return run


@pytest.fixture(scope="session")
def tokens(workspace: Path, run_command: Callable[[str], str]) -> Path:
    """``tokens/`` in the workspace, as the first command of README makes it."""
    run_command("vidshard tokenize clips/ --out tokens/")
    return workspace / "tokens"


@pytest.fixture(scope="session")
def latents(workspace: Path, run_command: Callable[[str], str]) -> Path:
    """``latents/`` in the workspace, as a command of docs/tokenizing.md makes it."""
    run_command(
        "vidshard tokenize clips/ --out latents/ --tokenizer vidtwin_tiny --random-weights 0 --frames 8 --size 64"
    )
    return workspace / "latents"


@pytest.fixture
def inside(workspace: Path, tokens: Path, latents: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workspace as the current folder."""
    monkeypatch.chdir(workspace)
    return workspace


# code and commands


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.place)
def test_every_block_is_of_a_known_kind(block: Block) -> None:
    assert block.language in LANGUAGES, f"{block.place}: {block.language!r} is none of {sorted(LANGUAGES)}"
    if block.language == "mermaid":
        assert block.text.split()[0] in ("flowchart", "sequenceDiagram"), block.place


@blocks("bash", "console")
def test_every_command_parses(block: Block, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    commands = commands_of(block)
    assert commands, f"{block.place} holds no command"
    for command in commands:
        check_command(command)


@blocks("bash", "console", word="run")
def test_commands_run(block: Block, tokens: Path, latents: Path, run_command: Callable[[str], str]) -> None:
    for command in commands_of(block):
        printed = run_command(" ".join(shlex.split(command, comments=True)))
        if block.language == "console":
            _check_output(block, output_of(block, command), printed)


@blocks("python", without="ray")
def test_python_runs(block: Block, inside: Path) -> None:
    exec(compile(block.text, block.place, "exec"), {"__name__": "docs"})


@blocks("python", word="ray")
def test_python_with_ray_runs(block: Block, inside: Path, ray_session: None) -> None:
    exec(compile(block.text, block.place, "exec"), {"__name__": "docs"})


@blocks("sql")
def test_sql_runs(block: Block, inside: Path) -> None:
    import duckdb

    relation = duckdb.sql(block.text.strip().rstrip(";"))
    assert relation is not None
    assert relation.fetchall()


@blocks("yaml")
def test_yaml_is_valid(block: Block) -> None:
    values = yaml.safe_load(block.text)
    if block.words[1] == "tokenize":
        resolve_settings(TokenizeRun, {"inputs": ["clips/"], "out": "tokens/", **values}, None)
    else:
        training_run("paper_stage1", ("stage1",), {"videos": ("clips/",), "out": "runs/mine", **values})


@blocks("text", word="layout")
def test_files_of_a_layout_exist(block: Block, inside: Path) -> None:
    folder = inside / block.words[1]
    for line in block.text.splitlines():
        pattern = line.split()[0]
        assert list(folder.glob(pattern)), f"{block.place}: nothing in {folder} is called {pattern}"


@blocks("text", word="tree")
def test_folders_of_a_tree_exist(block: Block) -> None:
    for line in block.text.splitlines():
        assert (ROOT / line.split()[0]).is_dir(), f"{block.place}: there is no {line.split()[0]}"


@pytest.mark.parametrize(("page", "in_rooms"), [("README.md", False), ("docs/architecture.md", True)])
def test_trees_name_every_folder(page: str, in_rooms: bool) -> None:
    trees = [block.text for block in BLOCKS if "tree" in block.words and block.place.startswith(page)]
    named = {line.split()[0].rstrip("/") for text in trees for line in text.splitlines()}
    rooms = [path.parent for name in CODE for path in (ROOT / name).rglob("__init__.py")] if in_rooms else []
    for folder in [*TOP_FOLDERS, *(str(room.relative_to(ROOT)) for room in rooms)]:
        assert folder in named, f"the tree of {page} does not name {folder}/"


def _check_output(block: Block, shown: list[str], printed: str) -> None:
    """Every line that is shown has to be printed, in that order, but for numbers."""
    lines = iter([_shape(line) for line in printed.splitlines()])
    for line in shown:
        if line != "...":
            wanted = _shape(line.removesuffix("..."))
            matches = (lambda text, w=wanted: text.startswith(w)) if line.endswith("...") else wanted.__eq__
            assert any(matches(text) for text in lines), f"{block.place}: not printed: {line}\n{printed}"


def _shape(line: str) -> str:
    line = re.sub(r"\S*/(?=\w+/?$)", "", line.rstrip())  # the folder's own path
    return re.sub(r"\s+", " ", re.sub(r"\b\d[\d,.]*", "0", line)).strip()


# tables


@on_each_page
def test_generated_tables_are_current(page: Path) -> None:
    text = page.read_text()
    assert MISSING not in text
    assert rewrite(text) == text, f"{page.name} is stale: make docs"


# prose


def test_readme_is_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@on_each_page
def test_sentences_are_short(page: Path) -> None:
    most = 25 if page.name == "README.md" else 35
    text = re.sub(r"(?s)<!-- generated: modules -->.*?<!-- end of modules -->", "", page.read_text())
    long = [sentence for sentence in sentences_of(text) if len(sentence.split()) > most]
    assert not long, f"{page.name}: more than {most} words:\n" + "\n".join(long)


@on_each_page
def test_links_resolve(page: Path) -> None:
    for link in links_of(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors_of(target), f"{page.name} links to {link}; {target.name} has {anchors_of(target)}"


@on_each_page
def test_files_and_names_that_are_mentioned_exist(page: Path) -> None:
    for code in inline_code_of(page.read_text()):
        assert _exists(code), f"{page.name} mentions `{code}`"


def _exists(code: str) -> bool:
    if re.fullmatch(r"(vidshard|benchmarks|tests)(\.\w+)+", code):
        return code.removeprefix("vidshard.") in METADATA or _importable(code)
    if code.startswith(tuple(f"{folder}/" for folder in TOP_FOLDERS)) and not re.search(r"[*\s]", code):
        path, _, test = code.partition("::")
        return (ROOT / path).exists() and (not test or f"def {test}(" in (ROOT / path).read_text())
    if re.fullmatch(r"\w+\.py", code):
        return any(code in files for _, _, files in os.walk(ROOT))
    return True


def _importable(name: str) -> bool:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            thing = getattr(thing, part, None)
        return thing is not None
    return False


METADATA = {
    key.removeprefix("vidshard.")
    for key in Provenance.__dataclass_fields__.keys() | {"format_version", "shape", "codebook_size", "keep_logvar"}
}


@on_each_page
def test_files_hold_the_names_that_a_page_gives_them(page: Path) -> None:
    for path, names in re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", page.read_text()):
        source = (ROOT / path).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"\b{name}\b", source), f"{page.name}: {path} has no {name}"


@on_each_page
def test_flags_and_commands_that_are_mentioned_exist(page: Path) -> None:
    flags, commands = known_flags(), command_names()
    for code in inline_code_of(page.read_text()):
        words = code.split()
        if (words[0] in ("make", "pytest") and len(words) > 1) or code.startswith("python -m "):
            check_command(code)
        elif words[0] not in ("ruff", "mypy", "git", "docker", "pip", "ffmpeg"):
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", code):
                assert flag in flags, f"{page.name} mentions {flag} in `{code}`"
            if words[0] == "vidshard" and len(words) > 1 and words[1].islower():
                assert words[1] in commands, f"{page.name} mentions `{code}`"


# the checks themselves


@pytest.mark.parametrize(
    "command",
    [
        "vidshard tokenise clips/ --out tokens/",
        "vidshard tokenize clips/ --out tokens/ --frame 17",
        "vidshard tokenize clips/ --out tokens/ --fps fast",
        "vidshard tokenize clips/",
        "vidshard train stage1 --videos a/ --out b --batch-size none",
        "vidshard decode tokens/ --clip 1",
        "make everything",
        "make demo CLIPS=a",
        "python -m benchmarks.nothing",
        "python -m benchmarks.decode --no-such-flag",
        "pip install 'vidshard[everything]'",
        "pytest tests/test_nothing.py",
        "sudo rm",
    ],
)
def test_a_command_that_cannot_work_is_found(command: str) -> None:
    with pytest.raises(CommandError):
        check_command(command)


def test_output_that_is_not_printed_is_found() -> None:
    block = BLOCKS[0]
    _check_output(block, ["...", "clips 12 written", "speed 3 ..."], "a\n clips  1,600 written\nspeed 4 clips/s\n")
    for shown in (["clips 12 read"], ["speed 1 ...", "clips 1 written"]):
        with pytest.raises(AssertionError):
            _check_output(block, shown, "clips 1 written\nspeed 4 clips/s\n")


def test_sentences_are_split_where_they_end() -> None:
    text = "# Head\nOne `a. b` two. Three\nfour.\n\n- five\n- six seven\n\n| a | b c. D |\n```bash\nno. No\n```\n"
    assert list(sentences_of(text)) == ["One CODE two.", "Three four.", "five", "six seven", "a", "b c.", "D"]


def test_names_that_do_not_exist_are_found() -> None:
    assert _exists("pipeline/flow.py")
    assert _exists("vidshard.models.tokenizer")
    assert _exists("vidshard.format_version")
    for code in ("pipeline/nothing.py", "vidshard.nothing", "nothing_at_all.py", "tests/nothing/"):
        assert not _exists(code)
