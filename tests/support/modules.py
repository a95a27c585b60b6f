"""Lists the modules that a process has loaded. This module loads none itself."""

from __future__ import annotations

import sys


def loaded_modules() -> list[str]:
    """Names of the modules."""
    return sorted(sys.modules)
