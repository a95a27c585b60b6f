"""Settings of the clients that file systems use, and whether a web server answers at all."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urljoin

import fsspec.config
from fsspec import get_filesystem_class
from fsspec.asyn import sync

from vidshard.pipeline.storage.addresses import guarded_client
from vidshard.pipeline.storage.transient import is_transient_status

_ANSWER_SECONDS, _CONNECT_SECONDS = 15.0, 5.0
"""Seconds that one request waits for an answer, or for more of it, and for a connection."""


def client_options(protocol: str) -> dict[str, Any]:
    """Options of a file system's client: time-outs, and for HTTP a client that refuses private addresses.

    The user's own settings in fsspec's configuration take precedence.

    Args:
        protocol: in lower case, such as ``s3``.
    """
    if protocol in ("s3", "s3a"):
        config: dict[str, Any] = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _ANSWER_SECONDS}
        if not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
            # one request of many, such as a part of an upload, is retried before all of them are
            config["retries"] = {"mode": "standard", "total_max_attempts": 3}
        return {"config_kwargs": config | _configured("config_kwargs", "s3", "s3a")}
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_ANSWER_SECONDS)
        client = {"timeout": timeout} | _configured("client_kwargs", "http", "https")
        return {"client_kwargs": client, "get_client": guarded_client}
    return {}


def _configured(option: str, *protocols: str) -> dict[str, Any]:
    """An option of fsspec's config that is a dictionary, merged over the protocols."""
    found: dict[str, Any] = {}
    for protocol in protocols:
        found |= fsspec.config.conf.get(protocol, {}).get(option) or {}
    return found


def answers(url: str) -> bool:
    """Whether a web server that failed for one file is up: asked for its root, it answers something else than 5xx."""
    fs: Any = get_filesystem_class("https")(use_listings_cache=False, **client_options("https"))

    async def ask() -> bool:
        session: Any = await fs.set_session()
        async with session.head(urljoin(url, "/"), allow_redirects=False, timeout=_ANSWER_SECONDS) as answer:
            return not is_transient_status(answer.status)

    try:
        return bool(sync(fs.loop, ask, timeout=2 * _ANSWER_SECONDS))
    except Exception:  # noqa: BLE001  whatever it is, it is no answer
        return False
