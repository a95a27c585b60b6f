"""Files of weights at URLs: signed ones work, and what signs them is never printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.http_server import http_server
from vidshard.models.tokenizer import PRESETS
from vidshard.models.weights import load_tokenizer, save_tokenizer
from vidshard.pipeline import storage
from vidshard.pipeline.resolved_run import stated_config
from vidshard.pipeline.storage import StorageError
from vidshard.schemas.errors import UserError

SECRET = "X-Amz-Signature=S3CR/3T.x"


def test_weights_at_a_signed_url_are_loaded(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    save_tokenizer(path, load_tokenizer(PRESETS["tiny"], None, seed=0))
    with http_server(lambda asked: path.read_bytes() if "S3CR" in asked else None) as server:
        assert stated_config(f"{server.url}/w.safetensors?{SECRET}") == PRESETS["tiny"]


def test_errors_about_signed_weights_do_not_show_what_signs_them() -> None:
    with http_server(lambda asked: b"no weights" if "there" in asked else None) as server:
        for name in ("there.safetensors", "there.ckpt", "there.txt", "gone.ckpt", "there"):
            with pytest.raises(UserError) as error:
                stated_config(f"{server.url}/{name}?{SECRET}")
            assert "S3CR" not in str(error.value)
            assert f"{server.url}/{name}" in str(error.value)


def test_a_cached_file_alone_may_be_asked_for() -> None:
    with (
        http_server(lambda _asked: b"x") as server,
        pytest.raises(StorageError, match="not fetched by itself"),
        storage.local_copy(f"{server.url}/w.ckpt", cached_only=True),
    ):
        pass
    assert server.asked == []
