"""Docstrings open with the term that they explain, in source and tests: no fragment, and no word for a neighbor."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.markdown import ROOT

FOLDERS = ("schemas", "models", "pipeline", "jobs", "benchmarks", "examples", "deploy", "tests")
FRAGMENT = re.compile(r"(Of|What|How|Where|And|Its|It is|Which)\b")
"""Openings that need something read before, or that leave the term for the end. "Whether" opens those of booleans."""


def _docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each, also of fields and constants, whose text follows them."""
    for node in ast.walk(ast.parse(path.read_text())):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            value = getattr(statement, "value", None) if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.lineno, value.value.strip()


def test_no_docstring_opens_with_a_fragment() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in _docstrings(path)
        if FRAGMENT.match(text)
    ]
    assert not found, "open these docstrings with their term:\n" + "\n".join(found)
