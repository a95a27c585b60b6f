"""Checks that hold for every report: valid HTML, nothing from outside, nothing that runs but the page's own script."""

from __future__ import annotations

import base64
import hashlib
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

html5lib = pytest.importorskip("html5lib")

PLAIN_SVG = '<svg role="img" viewBox="0 0 2 2"><g><path d="M0,0L1,1"/></g></svg>'
"""A chart for pages whose charts do not matter: the program that draws them takes a second."""

_HTML = "{http://www.w3.org/1999/xhtml}"


def parsed(html: str) -> ET.Element:
    """Parse a report, and check what holds for every one.

    Raises:
        AssertionError, html5lib.html5parser.ParseError: a check failed.
    """
    page: ET.Element = html5lib.HTMLParser(strict=True).parse(html)
    elements = list(page.iter())
    ids = [element.attrib["id"] for element in elements if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    for element in elements:
        for name, value in element.attrib.items():
            assert not str(name).lower().startswith("on"), (element.tag, name)
            assert name != "style", element.tag
            if name == "href":
                assert value.startswith("#"), value
                assert value[1:] in ids, value
            if name in ("src", "poster", "data", "srcset", "action"):
                assert value.startswith(("data:video/webm;base64,", "data:image/")), value[:60]
    assert not re.search(r"url\(|@import", html)
    tags = [str(element.tag).removeprefix(_HTML) for element in elements]
    assert not {"iframe", "object", "embed", "link", "base", "form"} & set(tags)
    policy = next(e.attrib["content"] for e in elements if e.attrib.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert not {"'unsafe-inline'", "'unsafe-eval'", "https:", "*"} & set(re.split("[ ;]+", policy))
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        [text] = [element.text or "" for element in elements if element.tag == _HTML + tag]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    return page


def text_of(page: ET.Element) -> str:
    """All that a page shows, on one line."""
    body = page.find(f"{_HTML}body")
    assert body is not None
    return " ".join(
        " ".join(
            text for e in body.iter() if e.tag != f"{_HTML}script" for text in (e.text or "", e.tail or "")
        ).split()
    )


def report_text(path: Path) -> str:
    """Check a report, and give all that it shows on one line."""
    return text_of(parsed(path.read_text()))


def section_ids(page: ET.Element) -> list[str]:
    """Anchors of the sections of a page, in order."""
    return [element.attrib["id"] for element in page.iter(f"{_HTML}section")]
