"""Fixtures of several rooms of the pipeline's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.file_hub import Hub, running_hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub of our own that serves files, with one repository."""
    with running_hub() as hub:
        yield hub
