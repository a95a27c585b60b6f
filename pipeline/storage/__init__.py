"""One face for local and remote files: list, open, write atomically, and retry transient errors."""

from vidshard.pipeline.storage.addresses import restrict_addresses
from vidshard.pipeline.storage.errors import StorageError, StorageOutageError
from vidshard.pipeline.storage.file_systems import filesystem
from vidshard.pipeline.storage.files import (
    check_writable,
    create_exclusive,
    exists,
    fingerprint,
    fingerprint_of,
    list_files,
    open_binary,
    read_bytes,
    remove,
    remove_leftovers,
    write_atomic,
)
from vidshard.pipeline.storage.parquet_file import ParquetFile
from vidshard.pipeline.storage.paths import absolute, is_local, join
from vidshard.pipeline.storage.remote_video import WHOLE_BYTES, RemoteVideo, open_video
from vidshard.pipeline.storage.retry import RETRY_SECONDS, with_retries
from vidshard.pipeline.storage.staging import (
    StagedFile,
    StagedFileGoneError,
    close_area,
    discard,
    open_area,
    publish,
    remove_areas,
    stage,
)
from vidshard.pipeline.storage.transient import describe, is_transient, storage_errors
from vidshard.pipeline.storage.web_hosts import is_of_one_site, storage_hosts
from vidshard.pipeline.storage.web_listing import list_web_folder
from vidshard.pipeline.storage.weight_files import SHIPPED_SCHEME, local_copy, pinned
from vidshard.schemas.uris import public_uri

__all__ = [
    "RETRY_SECONDS",
    "SHIPPED_SCHEME",
    "WHOLE_BYTES",
    "ParquetFile",
    "RemoteVideo",
    "StagedFile",
    "StagedFileGoneError",
    "StorageError",
    "StorageOutageError",
    "absolute",
    "check_writable",
    "close_area",
    "create_exclusive",
    "describe",
    "discard",
    "exists",
    "filesystem",
    "fingerprint",
    "fingerprint_of",
    "is_local",
    "is_of_one_site",
    "is_transient",
    "join",
    "list_files",
    "list_web_folder",
    "local_copy",
    "open_area",
    "open_binary",
    "open_video",
    "pinned",
    "public_uri",
    "publish",
    "read_bytes",
    "remove",
    "remove_areas",
    "remove_leftovers",
    "restrict_addresses",
    "stage",
    "storage_errors",
    "storage_hosts",
    "with_retries",
    "write_atomic",
]
