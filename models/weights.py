"""Weights of a tokenizer: loading published files, checking, digest, saving; and the trained weights of the package.

No code in a file is executed. The entries of a file must match the network exactly, or loading fails. A digest over
the values identifies weights, independent of the file format.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, cast, overload

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vidshard.models.checkpoint_parts import own_state, own_tokenizer, own_weights
from vidshard.models.tokenizer import FAMILIES, PRESETS, Tokenizer, TokenizerConfig, parse_config
from vidshard.models.vidtok.config import VidTokConfig
from vidshard.models.vidtok.model import VidTok
from vidshard.models.vidtwin.config import VidTwinConfig
from vidshard.models.vidtwin.model import VidTwin
from vidshard.schemas.errors import VidshardError, first_line, one_line
from vidshard.schemas.fields import differences
from vidshard.schemas.text import readable

SHIPPED = ("fsq_causal_488_small_haar", "fsq_causal_488_small_haar_lpips", "fsq_causal_488_small")
"""Presets whose trained weights are part of the package."""
DEFAULT = SHIPPED[0]
"""Default tokenizer."""

MAX_PARAMETERS = 4_000_000_000
"""Largest network that is loaded, in parameters; those of VidTok have up to 0.2 billion, of VidTwin up to 1.3."""
MAX_SEEDED_PARAMETERS = 1_500_000_000
"""Largest network that gets random weights."""
MAX_HEADER_BYTES = 16 << 20
"""Largest header of a safetensors file that is parsed; those of published tokenizers take some 100 KB. Parsing 99 MB
takes 2.4 GB and 42 s."""


class WeightsError(VidshardError, ValueError):
    """A file holds no weights that can be used; the message names it and says why."""


class UnstatedModelError(WeightsError):
    """A file does not say which model it holds, and no config was given."""


class NoAveragesError(WeightsError):
    """A file has no averaged (EMA) weights, but they were requested."""


def shipped_weights(name: str = DEFAULT) -> Path:
    """Path of the trained weights in the package.

    Raises:
        FileNotFoundError: the package has no weights of that preset.
    """
    path = Path(__file__).parent / "shipped" / f"{name}.safetensors"
    if name not in SHIPPED or not path.is_file():
        raise FileNotFoundError(f"no weights of {name!r} come with vidshard; there are some of {', '.join(SHIPPED)}")
    return path


def training_summary(path: str | Path) -> dict[str, Any]:
    """Training summary stored in a ``.safetensors`` file: training settings and measured quality; empty if absent.

    Raises:
        ValueError: the file is not readable as safetensors, or its summary is not JSON.
    """
    metadata = _read_metadata(Path(path))
    try:
        summary = json.loads(metadata.get(_SUMMARY_KEY, "{}"))
    except ValueError as error:
        raise ValueError(f"{path} holds a training summary that is no JSON: {error}") from error
    return summary if isinstance(summary, dict) else {}


def count_parameters(config: TokenizerConfig) -> int:
    """Number of parameters of the network, tables that are not learned left out; no weights are allocated."""
    with torch.device("meta"):  # their names are enough
        tables = fixed_tables(config)
    return sum(math.prod(shape) for name, shape in _expected_shapes(config).items() if name not in tables)


def weights_digest(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 in hex over names, shapes and float32 values: the same weights give the same digest from any file.

    Args:
        state_dict: weights as `load_weights` returns them, without training state and name prefixes. Weights that
            were rounded to another dtype have another digest.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name]
        digest.update(f"{name}\0{','.join(str(size) for size in tensor.shape)}\0".encode())
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(values.astype("<f4", copy=False).data)
    return digest.hexdigest()


def checkpoint_name(name: str, config: TokenizerConfig) -> str:
    """Name in published files of the weight that the network calls ``name``, by the rule of its family."""
    return FAMILIES[config.family].checkpoint_name(name, config)


def fixed_tables(config: TokenizerConfig) -> Mapping[str, Tensor]:
    """Entries of the weights that are computed instead of learned, in the dtype that they have in published files."""
    return FAMILIES[config.family].fixed_tables(config)


def preset_in_name(path: str | Path) -> str | None:
    """Preset whose name occurs in the name of a weights file, the longest if several do; None if there is none.

    Example: ``vidtok_fsq_causal_488_32768_v1.1.ckpt`` contains ``fsq_causal_488_32768_v1_1``.
    """
    stem = re.sub(r"[-.]", "_", Path(path).stem.lower())
    found = [name for name in PRESETS if re.search(rf"(?<![a-z0-9]){name}(?![a-z0-9])", stem)]
    return max(found, key=len, default=None)


def seeded_weights(config: TokenizerConfig, seed: int) -> dict[str, Tensor]:
    """Random float32 weights that depend only on names, shapes and the seed, not on the machine or torch.

    Each entry has its own generator: numpy's frozen `RandomState`, seeded by the CRC-32 of its `checkpoint_name`
    started at the seed. Kernels are N(0, 1) * 1.5 / sqrt(inputs), which keeps feature maps at unit scale; those of
    queries, keys and values have 0.7 instead of 1.5. By mean and standard deviation, gains are N(1, 0.1), biases and
    tables of shifts N(0, 0.1) and query embeddings N(0, 1). Mix factors are uniform in [-1, 1). `fixed_tables` are
    computed as always.

    Args:
        seed: in [0, 2**32).

    Raises:
        ValueError: the seed is out of range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in 0 ... {2**32 - 1}, got {seed}")
    tables = fixed_tables(config)
    weights: dict[str, Tensor] = {}
    for name, shape in _expected_shapes(config, MAX_SEEDED_PARAMETERS).items():
        if name in tables:
            weights[name] = tables[name]
            continue
        random = np.random.RandomState(zlib.crc32(checkpoint_name(name, config).encode(), seed))
        if name.endswith("mix_factor"):
            values = random.uniform(-1.0, 1.0, shape)
        elif name.endswith(("scale_shift_table", "query_embeds")):
            values = random.standard_normal(shape) * (1.0 if name.endswith("query_embeds") else 0.1)
        elif name.endswith(".gamma"):
            values = 0.1 * random.standard_normal(shape) + 1.0
        elif len(shape) >= 2:
            gain = 0.7 if name.endswith("qkv.weight") else 1.5
            values = random.standard_normal(shape) * (gain / math.sqrt(math.prod(shape[1:])))
        else:
            values = 0.1 * random.standard_normal(shape) + (0.0 if name.endswith(".bias") else 1.0)
        weights[name] = torch.from_numpy(np.asarray(values, np.float32))
    return weights


@overload
def load_tokenizer(
    config: VidTokConfig,
    weights: str | Path | None,
    *,
    seed: int | None = None,
    ema: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VidTok: ...


@overload
def load_tokenizer(
    config: VidTwinConfig,
    weights: str | Path | None,
    *,
    seed: int | None = None,
    ema: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VidTwin: ...


@overload
def load_tokenizer(
    config: TokenizerConfig,
    weights: str | Path | None,
    *,
    seed: int | None = None,
    ema: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tokenizer: ...


def load_tokenizer(
    config: TokenizerConfig,
    weights: str | Path | None,
    *,
    seed: int | None = None,
    ema: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tokenizer:
    """Build a tokenizer and load its weights, for inference: eval mode, no gradients.

    Args:
        weights: path of a file for `load_weights`; None with a seed.
        seed: seed of `seeded_weights` instead of a file, for tests and demos.
        ema: load the averaged weights of the file, see `load_weights`.
        device: device of the weights.
        dtype: precision of the network; quantizers compute in float32.

    Raises:
        ValueError, FileNotFoundError: as `load_weights`; or not exactly one of weights and seed is given.
    """
    if ema and weights is None:
        raise ValueError("averaged weights come from a file, got none")
    if weights is not None and seed is None:
        state = load_weights(weights, config, ema=ema)[1]
    elif weights is None and seed is not None:
        state = seeded_weights(config, seed)
    else:
        raise ValueError(f"give either a weights file or a seed, got weights={weights!r}, seed={seed}")
    network = _empty(config)
    network.load_state_dict(state, strict=True, assign=True)
    network.eval().requires_grad_(False)
    return cast(Tokenizer, network).set_precision(dtype).to(device)


def load_weights(
    path: str | Path, config: TokenizerConfig | None = None, *, ema: bool = False
) -> tuple[TokenizerConfig, dict[str, Tensor]]:
    """Read the weights of a tokenizer and check that they are exactly those of a config.

    Reads ``.safetensors``, and ``.ckpt``, ``.pt`` and ``.pth`` without executing code in them. Weights may lie at the
    top level or under ``state_dict``, named as by `checkpoint_name`. Names that start with ``loss.`` or ``model_ema.``
    are ignored; ``module.`` and ``_orig_mod.`` segments are removed. Of a checkpoint of ``vidshard train`` the weights
    are those that its stage would export: averages where it keeps some.

    Args:
        config: config of the weights; None for the config that `save_tokenizer` stored in the file.
        ema: load the moving average that training stored under ``model_ema.``.

    Returns:
        The config, and float32 tensors on the CPU by name; `fixed_tables` have the dtype that they are computed in.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: the file is unreadable or would execute code, it states another config, or none though none is
            given. Also if entries are missing, foreign, mis-shaped, not plain arrays or not finite, if `fixed_tables`
            have other values, or if the file is named after another preset whose weights have the same names and
            shapes. It is a ValueError.
        NoAveragesError: averages are requested, but the file has none; a WeightsError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    if path.suffix == ".safetensors":
        stated, entries = _read_safetensors(path)
    elif config is not None and path.suffix not in FAMILIES[config.family].suffixes:
        taken = ", ".join(FAMILIES[config.family].suffixes)
        raise WeightsError(f"{path}: weights of {config.name} are {taken} files")
    elif path.suffix in (".ckpt", ".pt", ".pth"):
        stated, entries = None, read_checkpoint(path)
        if (state := own_state(entries)) is not None:
            stated, entries = _of_own_checkpoint(path, state, ema)
            ema = False
    else:
        raise WeightsError(f"{path}: weights files end in .safetensors, .ckpt, .pt or .pth, got {path.suffix!r}")
    if config is None:
        if stated is None:
            raise UnstatedModelError(f"{path} does not say which model it holds: give a preset or config")
        config = stated
    if stated is not None:
        _check_same_network(path, stated, config)
    entries = {name: value for name, value in entries.items() if not FAMILIES[config.family].is_no_weight(name)}
    tensors = _averages(path, entries, config) if ema else _bare_names(path, entries)
    _check_entries(path, tensors, config)
    if stated is None:
        _check_name(path, config)
    tensors = {name: tensors[checkpoint_name(name, config)] for name in _expected_shapes(config)}
    weights = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    if not_finite := [checkpoint_name(n, config) for n, tensor in weights.items() if not torch.isfinite(tensor).all()]:
        raise WeightsError(f"{path}: weights that are not finite: {_abbreviated(not_finite)}")
    tables = fixed_tables(config)
    _check_tables(path, tensors, tables)
    return config, weights | dict(tables)


def save_tokenizer(path: str | Path, tokenizer: Tokenizer, *, summary: Mapping[str, object] | None = None) -> None:
    """Write weights and config to one ``.safetensors`` file, atomically; the weights keep their dtype.

    Args:
        summary: JSON values for `training_summary` to return; None for none.

    Raises:
        ValueError: the path does not end in ``.safetensors``.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"a tokenizer is saved as .safetensors, got {path}")
    entries = {
        checkpoint_name(name, tokenizer.config): tensor.detach().to("cpu").contiguous()
        for name, tensor in tokenizer.state_dict().items()
    }
    metadata = {"format": "pt", _CONFIG_KEY: tokenizer.config.model_dump_json()}
    if summary is not None:
        metadata[_SUMMARY_KEY] = json.dumps(summary)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        safetensors.torch.save_file(entries, partial, metadata=metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


_CONFIG_KEY = "vidshard_tokenizer_config"
_SUMMARY_KEY = "vidshard_training_summary"
_EMA_PREFIX = "model_ema."


class _WithoutValues(TorchFunctionMode):
    """Mode in which initializing a tensor does nothing: on the device "meta" it would load torch's compiler first."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _empty(config: TokenizerConfig) -> torch.nn.Module:
    """Build the network without storage for its weights."""
    with torch.device("meta"), _WithoutValues():
        return FAMILIES[config.family].build(config)


def _expected_shapes(config: TokenizerConfig, limit: int = MAX_PARAMETERS) -> Mapping[str, tuple[int, ...]]:
    shapes = _shapes(config)
    count = sum(map(math.prod, shapes.values()))
    if count > limit:
        raise WeightsError(f"{readable(config.name)} has {count:,} parameters; at most {limit:,} are allowed here")
    return shapes


@lru_cache(maxsize=64)
def _shapes(config: TokenizerConfig) -> Mapping[str, tuple[int, ...]]:
    """Shape of each weight; kept, as building a network takes some 10 ms."""
    return MappingProxyType({name: tuple(tensor.shape) for name, tensor in _empty(config).state_dict().items()})


def _checkpoint_shapes(config: TokenizerConfig) -> dict[str, tuple[int, ...]]:
    """Expected shapes by the names in published files."""
    return {checkpoint_name(name, config): shape for name, shape in _expected_shapes(config).items()}


def _check_header(path: Path) -> None:
    """Refuse a header of a safetensors file that is too large to be parsed.

    Raises:
        WeightsError: it is, or the file has none.
    """
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
    if num_bytes > min(MAX_HEADER_BYTES, path.stat().st_size):
        raise WeightsError(
            f"{path} is not a readable safetensors file: its header is said to take {num_bytes:,} bytes, and at most "
            f"{MAX_HEADER_BYTES:,} are read"
        )


def _read_metadata(path: Path) -> dict[str, str]:
    _check_header(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {first_line(error, 400)}") from error


def _read_safetensors(path: Path) -> tuple[TokenizerConfig | None, dict[str, object]]:
    _check_header(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            entries: dict[str, object] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {first_line(error, 400)}") from error
    if _CONFIG_KEY not in metadata:
        return None, entries
    try:
        return parse_config(json.loads(metadata[_CONFIG_KEY])), entries
    except (ValueError, RecursionError, OverflowError) as error:  # including pydantic's ValidationError
        raise WeightsError(
            f"{path} states a tokenizer config that this version does not know: {one_line(error, 400)}"
        ) from error


def _refuse_packed(file: BinaryIO, path: str | Path) -> None:
    """Refuse a checkpoint whose archive unpacks to more than the file: torch packs nothing.

    Raises:
        WeightsError: it does, or its directory is damaged.
    """
    try:
        num_bytes = file.seek(0, os.SEEK_END)
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(max(0, entry.file_size) for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise WeightsError(f"{path} is not a readable checkpoint: {first_line(error, 400)}") from error
    finally:
        file.seek(0)
    if unpacked > num_bytes:
        raise WeightsError(f"{path} is refused: it unpacks to {unpacked:,} bytes, more than it has")


# Numbers of numpy, which learning-rate schedules leave in training checkpoints: a type, a dtype and bytes. Reading one
# calls nothing but numpy's constructor of scalars, which refuses objects. It has another name in files of numpy 1.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    np.dtype,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
    _NUMPY_SCALAR,
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
]


def read_checkpoint(path: Path) -> dict[str, object]:
    """Read the entries of a ``.ckpt``, ``.pt`` or ``.pth`` file, those under ``state_dict`` if it has one.

    Nothing in the file is executed.

    Raises:
        WeightsError: the file is unreadable, or would execute code.
    """
    with path.open("rb") as file:
        loaded = read_pickled(file, path)
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise WeightsError(f"{path} holds a {type(loaded).__name__} where a table of tensors by name should be")
    return {str(name): value for name, value in loaded.items()}


def read_pickled(file: BinaryIO, path: str | Path) -> object:
    """Read what torch saved, on the CPU; nothing in the file is executed.

    Args:
        path: what messages call the file.

    Raises:
        WeightsError: the file is unreadable, would execute code, or unpacks to more than it has.
    """
    _refuse_packed(file, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that are refused by who takes them
            with torch.serialization.safe_globals(_HARMLESS):
                loaded: object = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message names the requested object, but also advises to load the file unsafely: only the name is kept
        asked_for = re.search(r"GLOBAL ([\w.]{1,200})", str(error))
        reason = f"it asks for {asked_for[1]}" if asked_for else "it is broken, or holds more than tensors"
        raise WeightsError(
            f"{path} is refused: {reason}, and loading it would execute code. Where you trust it, save the tensors of "
            "its 'state_dict' alone to a new .safetensors or .ckpt file, with the program that wrote it."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # the unpickler raises anything on bytes that are not a pickle
        raise WeightsError(f"{path} is not a readable checkpoint: {first_line(error, 400)}") from error
    return loaded


def _of_own_checkpoint(path: Path, state: Mapping[str, Any], ema: bool) -> tuple[TokenizerConfig, dict[str, object]]:
    """Config and entries of a checkpoint of ``vidshard train``, as its stage would export them."""
    if ema and not state["averages"]:
        raise NoAveragesError(f"{path} holds no averaged (EMA) weights, only one set: take it without ema")
    try:
        config = parse_config(own_tokenizer(state))
    except (ValueError, RecursionError, OverflowError) as error:
        raise WeightsError(
            f"{path} states a tokenizer config that this version does not know: {one_line(error, 400)}"
        ) from error
    weights = own_weights(state, averaged=True)
    return config, {checkpoint_name(name, config): value for name, value in weights.items()}


def _bare_names(path: Path, entries: Mapping[str, object]) -> dict[str, Tensor]:
    """Weights of the tokenizer alone, without the segments that wrappers add to names."""
    bare: dict[str, object] = {}
    for full_name, value in entries.items():
        name = _unwrapped(full_name)
        if name.startswith(("loss.", _EMA_PREFIX)):
            continue
        if name in bare:
            raise WeightsError(f"{path} has {name} twice, once with a module. or _orig_mod. prefix")
        bare[name] = value
    return _floating_tensors(path, bare)


def _averages(path: Path, entries: Mapping[str, object], config: TokenizerConfig) -> dict[str, Tensor]:
    """Averaged weights by `checkpoint_name`; training stores them under names without dots."""
    names = [checkpoint_name(name, config) for name in _expected_shapes(config)]
    by_joined_name = {name.replace(".", ""): name for name in names}
    assert len(by_joined_name) == len(names)
    averages: dict[str, object] = {}
    for full_name, value in entries.items():
        name = _unwrapped(full_name)
        # ignored: the decay and the update counter, and averages of the loss
        joined_name = name.removeprefix(_EMA_PREFIX).replace("_orig_mod", "")
        if name.startswith(_EMA_PREFIX) and joined_name not in ("decay", "num_updates") and joined_name[:4] != "loss":
            averages[by_joined_name.get(joined_name, name)] = value
    if not averages:
        raise NoAveragesError(f"{path} holds no averaged (EMA) weights, only one set: take it without ema")
    # only what is learned is averaged
    plain = {_unwrapped(name): value for name, value in entries.items()}
    fixed = {checkpoint_name(name, config) for name, _ in _empty(config).named_buffers()} & plain.keys()
    return _floating_tensors(path, {name: plain[name] for name in fixed} | averages)


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _floating_tensors(path: Path, entries: Mapping[str, object]) -> dict[str, Tensor]:
    tensors = {n: value for n, value in entries.items() if isinstance(value, Tensor) and _is_plain(value)}
    if others := [name for name in entries if name not in tensors]:
        raise WeightsError(f"{path}: entries that are not floating tensors: {_abbreviated(others)}")
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is a floating array with values: not sparse, nested, quantized, or on the ``meta`` device."""
    return (
        tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
        and tensor.device.type == "cpu"
        and tensor.is_floating_point()
    )


def _check_same_network(path: Path, stated: TokenizerConfig, config: TokenizerConfig) -> None:
    if differing := network_differences(stated, config):
        raise WeightsError(f"{path} holds {stated.name}, not {config.name} ({differing})")


def _check_name(path: Path, config: TokenizerConfig) -> None:
    """Refuse weights of another preset with equal shapes, told by the file's name alone.

    Weights of v1.0 and v1.1 load into each other's network without an error and give wrong video.
    """
    named = PRESETS.get(preset_in_name(path) or "", config)
    differing = network_differences(named, config)
    if differing and _checkpoint_shapes(named) == _checkpoint_shapes(config):
        raise WeightsError(
            f"{path} is called after {named.name}, not {config.name}: these networks take each other's weights and "
            f"then give wrong video without a warning ({differing}). Load it as {named.name}; if it is the name that "
            f"is wrong, rename the file, or a copy of it"
        )


def network_differences(there: TokenizerConfig, here: TokenizerConfig) -> str:
    """List the config fields in which two networks differ, except the name; empty if they are equal."""
    theirs, ours = (json.loads(config.model_dump_json(exclude={"name"})) for config in (there, here))
    return "; ".join(differences(theirs, ours))


def _check_entries(path: Path, entries: Mapping[str, Tensor], config: TokenizerConfig) -> None:
    expected = _checkpoint_shapes(config)
    problems = {
        "missing": [name for name in expected if name not in entries],
        "foreign": [name for name in entries if name not in expected],
        "mis-shaped": [
            f"{name} {tuple(entries[name].shape)} instead of {shape}"
            for name, shape in expected.items()
            if name in entries and tuple(entries[name].shape) != shape
        ],
    }
    if any(problems.values()):
        listing = "; ".join(f"{len(names)} {what}: {_abbreviated(names)}" for what, names in problems.items() if names)
        raise WeightsError(f"{path} does not fit {config.name}{_other_latents(entries, config)}: {listing}")


def _other_latents(entries: Mapping[str, Tensor], config: TokenizerConfig) -> str:
    """Say which latents a file's weights make, if their shapes tell it and they are not those of the config."""
    family = FAMILIES[config.family]
    theirs = family.latents_in({name: tuple(tensor.shape) for name, tensor in entries.items()})
    ours = _latent_shapes(config)
    if not theirs or theirs == ours:
        return "; is it of another preset?"
    fitting = [name for name, preset in family.presets.items() if _latent_shapes(preset) == theirs]
    hint = f", those of {' or '.join(fitting)}" if fitting else ""
    return f", whose latents are {_sizes(ours)}; the file's are {_sizes(theirs)}{hint}"


def _latent_shapes(config: TokenizerConfig) -> dict[str, tuple[int, ...]]:
    return {column.name: column.shape for column in config.payload(*config.default_clip)}


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())


TABLE_TOLERANCE = 1e-6
"""Largest difference between `fixed_tables` and a file's, whose values lie in [-1, 1]; a file in half precision may
differ by its rounding."""


def _check_tables(path: Path, entries: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> None:
    """Refuse a file whose fixed tables are not those of the network: it was trained with others."""
    for name, table in tables.items():
        given = entries[name]
        difference = (given.to(table.dtype) - table).abs().max().item()
        if difference > max(TABLE_TOLERANCE, torch.finfo(given.dtype).eps):
            raise WeightsError(
                f"{path}: {name} is a fixed table, and differs from the one of the network by {difference:.2g}: the "
                "weights were made for another version of it"
            )


def _abbreviated(names: Iterable[str], limit: int = 10) -> str:
    names = [readable(name, 200) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
