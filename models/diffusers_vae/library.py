"""Networks of diffusers, built without values from the settings of a config.json.

diffusers is imported here alone, by the first function that needs it: together with torchvision it takes 2.5 s of a
CPU, once a process. Nothing of a repository is executed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from vidshard.models.diffusers_vae.classes import CLASSES, find_class
from vidshard.models.libraries.torchvision_operators import declare_torchvision_operators

MAX_TENSORS = 5_000
"""Most tensors of a network; released ones have fewer than 1,000."""
MAX_PARAMETERS = 4_000_000_000

_FILLED = frozenset({torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand, torch.full})


class _WithoutValues(TorchFunctionMode):
    """Makes the tensors that weights are made of on the meta device, and no more of them than a bound.

    Tables that a class computes, as by `torch.arange`, have their values: no file holds them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._num_tensors = self._num_values = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _FILLED:
            return func(*args, **(kwargs or {}))
        made = func(*args, **{**(kwargs or {}), "device": "meta"})
        self._num_tensors += 1
        self._num_values += made.numel()
        if self._num_tensors > MAX_TENSORS or self._num_values > MAX_PARAMETERS:
            raise ValueError(f"its network has more than {MAX_TENSORS:,} tensors or {MAX_PARAMETERS:,} values")
        return made


@cache
def library() -> Any:
    """The package diffusers.

    Raises:
        ValueError: it is not installed, or does not import.
    """
    try:
        with suppress(ImportError):  # diffusers imports torchvision where it is installed
            declare_torchvision_operators()
        import diffusers
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"this tokenizer needs the package diffusers ({error!s:.200}): pip install 'vidshard[diffusers]'"
        ) from error
    return diffusers


def installed_classes() -> tuple[str | None, frozenset[str]]:
    """Version of diffusers, None if it is not installed, and the classes that it has."""
    try:
        import diffusers  # by itself, without torchvision: 0.3 s
    except (ImportError, RuntimeError):
        return None, frozenset()
    return str(diffusers.__version__), frozenset(dir(diffusers)) & CLASSES.keys()


def find_network(name: str) -> Any:
    """Class of diffusers by name.

    Raises:
        ValueError: the class is not on the list, or the installed diffusers does not have it.
    """
    find_class(name)
    diffusers = library()
    try:
        return getattr(diffusers, name)
    except AttributeError:
        raise ValueError(f"diffusers {diffusers.__version__} has no {name}: install a newer one") from None
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"diffusers {diffusers.__version__} cannot import {name}: {error!s:.300}") from error


def parameters_of(name: str) -> dict[str, Any]:
    """Settings that a class takes, with their defaults; a required one has `inspect.Parameter.empty`.

    Raises:
        ValueError: as `find_network`.
    """
    parameters = inspect.signature(find_network(name).__init__).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key != "self"}


def build_network(name: str, settings: Mapping[str, Any], flags: Mapping[str, bool]) -> nn.Module:
    """Build a network whose weights are on the meta device; its computed tables are on the CPU.

    Args:
        name: class of diffusers.
        settings: arguments of the class.
        flags: switches to set.

    Raises:
        ValueError: the class does not take these settings, or the network is too large.
    """
    made = find_network(name)
    try:
        # Tables that a class computes stay on the CPU, whatever device the caller builds on.
        with torch.device("cpu"), _WithoutValues():
            network: nn.Module = made(**settings)
        _switch(network, flags)
    except Exception as error:  # a class checks few of its settings, and may raise anything on others
        raise ValueError(f"config.json describes no {name}: {error!s:.300}") from error
    return network.eval().requires_grad_(False)


def _switch(network: Any, flags: Mapping[str, bool]) -> None:
    for name, value in flags.items():
        if not isinstance(getattr(network, name, None), bool):
            raise ValueError(f"the class has no switch {name}")
        if name == "use_tiling" and value:
            network.enable_tiling()
        setattr(network, name, value)
