"""Reference files and real clips that some checkouts have beside them; the project does not need them."""

from pathlib import Path

SHARED = Path(__file__).resolve().parents[3] / "shared"
