"""Reads the project's Markdown pages: fenced blocks, generated blocks, links, sentences, and the names they mention.

Only the Markdown that the project uses is understood: fences of three backticks, pipe tables, ``-`` and ``1.`` lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Root of the checkout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A fenced code block."""

    page: Path
    line: int
    """Line of the opening fence, from 1."""
    language: str
    words: tuple[str, ...]
    """Words after the language, such as ``run``."""
    text: str

    @property
    def place(self) -> str:
        """``page:line``, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def project_pages() -> list[Path]:
    """README, CONTRIBUTING, CHANGELOG and every page of docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    """Fenced blocks of a page, in order."""
    found: list[Block] = []
    start = 0
    info: list[str] = []
    body: list[str] | None = None
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if not line.lstrip().startswith("```"):
            if body is not None:
                body.append(line)
        elif body is None:
            start, info, body = number, line.strip().removeprefix("```").split(), []
        else:
            language, *words = info or [""]
            text = "\n".join(body)
            found.append(Block(page=page, line=start, language=language, words=tuple(words), text=text))
            body = None
    return found


def commands_of(block: Block) -> list[str]:
    """Shell commands of a ``bash`` block, or those behind ``$`` in a ``console`` block; continued lines joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def output_of(block: Block, command: str) -> list[str]:
    """Lines that a ``console`` block shows below a command."""
    shown: list[str] = []
    inside = False
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            inside = line.removeprefix("$ ").strip() == command
        elif inside and line.strip():
            shown.append(line.rstrip())
    return shown


def without_code(text: str) -> str:
    """The page with its fenced blocks and comments blanked, line for line."""
    blank = lambda match: "\n" * match[0].count("\n")  # noqa: E731
    return re.sub(r"<!--.*?-->", blank, re.sub(r"(?ms)^\s*```.*?^\s*```", blank, text))


def sentences_of(text: str) -> Iterator[str]:
    """Sentences of a page's prose, list items and table cells; inline code counts as one word."""
    prose = re.sub(r"`[^`\n]+`", "CODE", without_code(text))
    prose = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", prose).replace("**", "").replace("*", "")
    paragraph: list[str] = []
    for line in [*prose.splitlines(), ""]:
        begins = re.match(r"\s*([-+]|\d+\.)\s", line)
        is_row = line.lstrip().startswith("|")
        if not line.strip() or line.startswith("#") or is_row or begins:
            yield from _split(" ".join(paragraph))
            paragraph = []
        if is_row:
            for cell in line.strip().strip("|").split("|"):
                yield from _split(cell)
        elif not line.startswith("#"):
            paragraph.append(line[begins.end() :] if begins else line)


def _split(paragraph: str) -> Iterator[str]:
    for sentence in re.split(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])", " ".join(paragraph.split())):
        if sentence.strip():
            yield sentence


def links_of(text: str) -> list[str]:
    """Targets of links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", without_code(text))


def anchors_of(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", without_code(page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def inline_code_of(text: str) -> list[str]:
    """Everything in single backticks outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", without_code(text))
