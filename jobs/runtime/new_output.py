"""New output: a job that is refused before it writes anything leaves none of the folders that it made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import LEASES
from vidshard.pipeline.output.lease import Holder
from vidshard.pipeline.storage import is_local


@contextmanager
def no_empty_output(out: str) -> Iterator[None]:
    """Context of a job; if it raises, folders that are new and hold nothing but its lease are removed.

    Args:
        out: output folder; a remote one has no folders to remove.
    """
    made = _missing_folders(out) if is_local(out) else []
    try:
        yield
    except BaseException:
        if made:
            with suppress(OSError):  # it holds something, or another run has begun to write
                _remove(made, Path(storage.absolute(out)))
        raise


def _missing_folders(out: str) -> list[Path]:
    """Folder of the leases, the output and the folders above it that are not there; the deepest first."""
    folder = Path(storage.absolute(out))
    return [each for each in (folder / LEASES, folder, *folder.parents) if not each.exists()]


def _remove(made: list[Path], out: Path) -> None:
    """Remove folders that were made.

    Raises:
        OSError: one holds something else than leases that were given back.
    """
    if any(path.name != LEASES for path in out.iterdir()):
        return  # leases of an output in which something was written keep their numbers
    for folder in made:
        if folder.name == LEASES and folder.parent == out and folder.is_dir():
            leases = list(folder.glob("*.json"))
            if not all((holder := Holder.of_bytes(path.read_bytes())) and holder.released for path in leases):
                return
            for path in leases:
                path.unlink()
        if folder.is_dir():
            folder.rmdir()
