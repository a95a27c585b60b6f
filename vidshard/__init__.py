"""Video corpora to Parquet shards of tokens or latents, and back.

This package is the public Python interface; docs/python.md shows each name in use. Names are imported when they are
first used, so ``import vidshard`` takes milliseconds and loads neither torch, Ray, PyAV nor pyarrow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vidshard.jobs.api import load_tokenizer, tokenize
    from vidshard.jobs.export.api import export, push
    from vidshard.jobs.export.job import ExportResult
    from vidshard.jobs.export.push import PushResult
    from vidshard.jobs.tokenization.summary import Summary
    from vidshard.models.tokenizer import Tokenizer, frames_to_input, output_to_frames
    from vidshard.pipeline.open_output import Output, open_output
    from vidshard.pipeline.output.shard_reader import StoredClip
    from vidshard.pipeline.reader.token_shards import TokenLoader, TokenShards
    from vidshard.pipeline.reader.token_shards_map import TokenShardsMap
    from vidshard.pipeline.sample_clips import sample_clips
    from vidshard.schemas.errors import VidshardError
    from vidshard.schemas.rejections import Rejection
    from vidshard.schemas.runs import TokenizeRun
    from vidshard.schemas.tokens import Provenance
    from vidshard.schemas.video import Clip

    __version__: str

__all__ = [
    "Clip",
    "ExportResult",
    "Output",
    "Provenance",
    "PushResult",
    "Rejection",
    "StoredClip",
    "Summary",
    "TokenLoader",
    "TokenShards",
    "TokenShardsMap",
    "TokenizeRun",
    "Tokenizer",
    "VidshardError",
    "__version__",
    "export",
    "frames_to_input",
    "load_tokenizer",
    "open_output",
    "output_to_frames",
    "push",
    "sample_clips",
    "tokenize",
]

_MODULES = {
    "Clip": "vidshard.schemas.video",
    "ExportResult": "vidshard.jobs.export.job",
    "Output": "vidshard.pipeline.open_output",
    "Provenance": "vidshard.schemas.tokens",
    "PushResult": "vidshard.jobs.export.push",
    "Rejection": "vidshard.schemas.rejections",
    "StoredClip": "vidshard.pipeline.output.shard_reader",
    "Summary": "vidshard.jobs.tokenization.summary",
    "TokenLoader": "vidshard.pipeline.reader.token_shards",
    "TokenShards": "vidshard.pipeline.reader.token_shards",
    "TokenShardsMap": "vidshard.pipeline.reader.token_shards_map",
    "TokenizeRun": "vidshard.schemas.runs",
    "Tokenizer": "vidshard.models.tokenizer",
    "VidshardError": "vidshard.schemas.errors",
    "export": "vidshard.jobs.export.api",
    "frames_to_input": "vidshard.models.tokenizer",
    "load_tokenizer": "vidshard.jobs.api",
    "open_output": "vidshard.pipeline.open_output",
    "output_to_frames": "vidshard.models.tokenizer",
    "push": "vidshard.jobs.export.api",
    "sample_clips": "vidshard.pipeline.sample_clips",
    "tokenize": "vidshard.jobs.api",
}
"""Module that defines each public name; a test keeps it equal to the imports above."""

if not TYPE_CHECKING:  # a type checker would take every name for one that exists

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used (PEP 562)."""
        from importlib import import_module, metadata

        if name == "__version__":
            value = metadata.version("vidshard")
        elif name in _MODULES:
            value = getattr(import_module(_MODULES[name]), name)
        else:
            raise AttributeError(f"module 'vidshard' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """List the public names, whether or not they were imported yet."""
    return sorted({*globals(), *__all__})
