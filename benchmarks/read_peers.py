"""Other readers of training data, for `benchmarks.read`: each in the fastest form that its manual shows.

All get the same values and give batches of torch tensors of the same dtype. `datasets` and `ray.data` read vidshard's
shards as they are. The others need their own files, which `convert` writes without compression, as is their default.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidshard.models.libraries.torchvision_operators import declare_torchvision_operators

BATCH = 32
BUFFER = 1000
"""Clips of a shuffle buffer, where a reader has one."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A data set: a folder, or an address on an S3 server."""

    path: str
    name: str
    """Payload column."""
    dtype: str
    width: int
    endpoint: str | None = None
    """Address of the S3 server; None for a folder."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A reader."""

    module: str
    read: Callable[[Place, bool, int], Iterator[int]]
    """Clips of each batch, from a place, shuffled or not, with loader workers."""
    convert: Callable[[Path, np.ndarray], None] | None = None
    """Write clips (rows, values) in its own format; None if it reads vidshard's shards."""
    reads_s3: bool = True
    is_apart: bool = False
    """Whether each measurement needs a process of its own, as what it starts does not end before the process."""

    @property
    def is_installed(self) -> bool:
        """Whether it can be imported."""
        return find_spec(self.module) is not None


def usable(values: np.ndarray) -> np.ndarray:
    """Values in a dtype with which torch computes."""
    return values if values.dtype.kind == "f" else values.astype(np.int32)


def _counted(loader: Any, name: str | None = None) -> Iterator[int]:
    for batch in loader:
        yield len(batch if name is None else batch[name])


def _loader(dataset: Any, workers: int, batch_size: int | None = BATCH) -> Any:
    return torch.utils.data.DataLoader(dataset, batch_size=batch_size, num_workers=workers)


def _datasets(place: Place, shuffle: bool, workers: int) -> Iterator[int]:
    import datasets

    options: dict[str, Any] = {}
    files: Any = sorted(str(path) for path in Path(place.path).glob("*.parquet"))
    if place.endpoint:
        import s3fs

        options = {"storage_options": {"endpoint_url": place.endpoint}}
        files = ["s3://" + path for path in s3fs.S3FileSystem(endpoint_url=place.endpoint).ls(place.path)]
    stream: Any = datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=True, columns=[place.name], **options
    )
    if shuffle:
        stream = stream.shuffle(seed=0, buffer_size=BUFFER)
    yield from _counted(_loader(stream.with_format("torch"), workers), place.name)


def _ray(place: Place, shuffle: bool, workers: int) -> Iterator[int]:
    import pyarrow.fs
    import ray

    ray.init(address="local", num_cpus=workers, log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    options: dict[str, Any] = {}
    if place.endpoint:
        options["filesystem"] = pyarrow.fs.S3FileSystem(endpoint_override=place.endpoint, scheme="http")
    paths = [place.path.removeprefix("s3://")] * 8  # so that little of it is read before the first batch
    dataset = ray.data.read_parquet(paths, columns=[place.name], **options)
    batches = dataset.iter_torch_batches(batch_size=BATCH, local_shuffle_buffer_size=BUFFER if shuffle else None)
    yield from _counted(batches, place.name)


def _write_tars(folder: Path, values: np.ndarray) -> None:
    for number, part in enumerate(np.array_split(values, 8)):
        with tarfile.open(folder / f"{number:04d}.tar", "w") as tar:
            for at, clip in enumerate(part):
                data = io.BytesIO()
                np.save(data, clip)
                info = tarfile.TarInfo(f"{number:04d}{at:06d}.npy")
                info.size = data.tell()
                data.seek(0)
                tar.addfile(info, data)


def _webdataset(place: Place, shuffle: bool, workers: int) -> Iterator[int]:
    import webdataset

    urls: Any = sorted(str(path) for path in Path(place.path).glob("*.tar"))
    if place.endpoint:
        address = f"{place.endpoint}/{place.path.removeprefix('s3://')}"
        urls = [f"pipe:curl -s -f {address}/{number:04d}.tar" for number in range(8)]
    dataset = webdataset.WebDataset(urls, shardshuffle=8 if shuffle else False, seed=0)
    if shuffle:
        dataset = dataset.shuffle(BUFFER)
    dataset = dataset.decode().to_tuple("npy").map(lambda row: torch.from_numpy(usable(row[0])))
    yield from _counted(_loader(dataset.batched(BATCH, collation_fn=torch.stack), workers, None))


def _item(clip: np.ndarray) -> dict[str, np.ndarray]:
    return {"x": clip}


def _write_litdata(folder: Path, values: np.ndarray, compression: str | None = None) -> None:
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder), chunk_bytes="16MB", compression=compression)
    for at, clip in enumerate(values):
        cache[at] = _item(clip)
    cache.done()
    cache.merge()


def _usable_item(item: dict[str, np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(usable(item["x"]))


def _litdata(place: Place, shuffle: bool, workers: int) -> Iterator[int]:
    import litdata

    options: dict[str, Any] = {"cache_dir": tempfile.mkdtemp(prefix="vidshard-litdata-")}
    if place.endpoint:
        from litdata.streaming import downloader

        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
        options["storage_options"] = {"endpoint_url": place.endpoint}
    dataset = litdata.StreamingDataset(place.path, shuffle=shuffle, transform=_usable_item, **options)
    yield from _counted(litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers))


def _write_array_records(folder: Path, values: np.ndarray) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    for number, part in enumerate(np.array_split(values, 8)):
        writer = ArrayRecordWriter(str(folder / f"{number:04d}.array_record"), "group_size:1")
        for clip in part:
            writer.write(clip.tobytes())
        writer.close()


def _grain(place: Place, shuffle: bool, workers: int) -> Iterator[int]:
    import grain

    dtype = np.dtype(place.dtype)
    files = sorted(str(path) for path in Path(place.path).glob("*.array_record"))
    dataset: Any = grain.MapDataset.source(grain.sources.ArrayRecordDataSource(files))
    if shuffle:
        dataset = dataset.shuffle(seed=0)
    dataset = dataset.map(lambda data: usable(np.frombuffer(data, dtype))).batch(BATCH)
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=64))
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    for batch in dataset:
        yield len(torch.from_numpy(batch))


def _write_mds(folder: Path, values: np.ndarray) -> None:
    declare_torchvision_operators()
    from streaming import MDSWriter

    columns = {"x": f"ndarray:{values.dtype}:{values.shape[1]}"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=16 << 20, progress_bar=False) as writer:
        for clip in values:
            writer.write(_item(clip))


def _streaming(place: Place, shuffle: bool, workers: int) -> Iterator[int]:
    declare_torchvision_operators()
    import streaming

    class Usable(streaming.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> Any:
            return _usable_item(super().__getitem__(at))

    streaming.base.util.clean_stale_shared_memory()
    local, remote = place.path, None
    if place.endpoint:
        os.environ["S3_ENDPOINT_URL"] = place.endpoint
        local, remote = tempfile.mkdtemp(prefix="vidshard-mds-"), place.path
    dataset = Usable(local=local, remote=remote, shuffle=shuffle, batch_size=BATCH, num_canonical_nodes=1)
    yield from _counted(_loader(dataset, workers))


PEERS = {
    "datasets": Peer(module="datasets", read=_datasets),
    "ray.data": Peer(module="ray", read=_ray, is_apart=True),
    "webdataset": Peer(module="webdataset", read=_webdataset, convert=_write_tars),
    "litdata": Peer(module="litdata", read=_litdata, convert=_write_litdata),
    "litdata zstd": Peer(module="litdata", read=_litdata, convert=partial(_write_litdata, compression="zstd")),
    "grain": Peer(module="grain", read=_grain, convert=_write_array_records, reads_s3=False),
    "streaming": Peer(module="streaming", read=_streaming, convert=_write_mds),
}
