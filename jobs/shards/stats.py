"""The job behind ``vidshard stats``: mean and standard deviation of latents by channel, for normalization."""

from __future__ import annotations

from rich.console import Console

from vidshard.pipeline.reader.stats import compute_stats, stats_path, write_stats
from vidshard.schemas.text import readable
from vidshard.schemas.uris import shown_uri


def write_output_stats(out: str, console: Console) -> None:
    """Compute, write and print the statistics of the latents of an output.

    Raises:
        UserError: it holds tokens, or is a single shard.
        ShardError: a shard is damaged; storage.StorageError: the file could not be written.
    """
    stats_path(out)
    catalog, stats = compute_stats(out)
    path = write_stats(out, catalog, stats)
    for name, values in stats.items():
        console.print(f"{readable(name)}: {values.count:,} values of each channel", highlight=False, markup=False)
        for at, (mean, std) in enumerate(zip(values.mean, values.std, strict=True)):
            console.print(f"  channel {at:<4} mean {mean:10.4f}   std {std:10.4f}", highlight=False, markup=False)
    console.print(f"wrote {shown_uri(path)}", highlight=False, markup=False)
