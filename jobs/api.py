"""The functions of `import vidshard` that run jobs or load models.

The command line prints and returns exit codes; these functions stay silent, return values and raise `VidshardError`.
"""

from __future__ import annotations

import torch
from rich.console import Console

from vidshard.jobs.tokenization import job
from vidshard.jobs.tokenization.summary import Summary
from vidshard.models.tokenizer import Tokenizer, TokenizerConfig
from vidshard.models.weights import DEFAULT, SHIPPED
from vidshard.pipeline import storage
from vidshard.pipeline.named_tokenizer import NamedTokenizer, find_tokenizer
from vidshard.pipeline.resolved_run import stated_config
from vidshard.pipeline.tokenizer_source import TokenizerSource
from vidshard.schemas.errors import EXIT_AGAIN, RunCutShortError, RunFailedError, UserError
from vidshard.schemas.runs import TokenizeRun


def tokenize(run: TokenizeRun, *, console: Console | None = None, local: bool = False) -> Summary:
    """Tokenize videos into Parquet shards, as ``vidshard tokenize`` does.

    Running it again with the same settings tokenizes what is left, and nothing twice. Bad videos are no errors: the
    output has a row in ``rejects/`` for each.

    Args:
        run: the settings, named as the flags of ``vidshard tokenize``.
        console: where to print the progress and the summary; None prints nothing.
        local: run every stage in this process, without Ray.

    Returns:
        The figures of the run, which ``summary.json`` holds too.

    Raises:
        VidshardError: the request cannot be carried out, or the run failed; what is committed stays valid.
        KeyboardInterrupt: the run was interrupted; the same call goes on.
    """
    summary = job.tokenize(run, console or Console(quiet=True), local=local)
    if summary.interruption is not None:
        raise summary.interruption
    if summary.problems:
        kind = RunCutShortError if summary.exit_code == EXIT_AGAIN else RunFailedError
        raise kind("; ".join(summary.problems))
    return summary


def load_tokenizer(
    tokenizer: str | TokenizerConfig | None = None,
    weights: str | None = None,
    *,
    ema: bool = False,
    seed: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tokenizer:
    """Load a tokenizer for inference.

    Args:
        tokenizer: the name of a preset (``vidshard tokenizers`` lists them), ``diffusers:OWNER/REPO`` or
            ``diffusers:FOLDER``, or a config; None takes what the weights file states, and without weights the
            tokenizer that comes with the package.
        weights: a path, a URL, or ``hf://OWNER/REPO/PATH``; None takes the weights that the name stands for, or
            those that come with the package.
        ema: take the averaged weights of the file.
        seed: make random weights from this seed instead, in [0, 2**32), for tests.
        device: where the weights go.
        dtype: dtype that the network computes in; quantizers compute in float32.

    Returns:
        The tokenizer in eval mode, without gradients.

    Raises:
        UserError: an unknown preset, no weights for it, or weights that do not fit it.
    """
    if weights is not None and seed is not None:
        raise UserError(f"give either weights or a seed, got {storage.public_uri(weights)} and {seed}")
    if weights is not None:
        weights = storage.pinned(storage.absolute(weights))
    named = _named(tokenizer, weights, ema=ema)
    config = named.config
    if weights is None and seed is None:
        weights = named.weights
    if weights is None and seed is None:
        if config.name not in SHIPPED:
            raise UserError(
                f"no weights for {config.name}: give weights='model.safetensors', or seed=0 to try the machinery with "
                f"random ones; {DEFAULT} comes with its own"
            )
        weights = f"{storage.SHIPPED_SCHEME}{config.name}"
    return TokenizerSource(config=config, weights=weights, ema=ema, seed=seed).load(device, dtype)


def _named(tokenizer: str | TokenizerConfig | None, weights: str | None, *, ema: bool) -> NamedTokenizer:
    if isinstance(tokenizer, str) or (tokenizer is None and weights is None):
        return find_tokenizer(tokenizer or DEFAULT)
    if tokenizer is None:
        assert weights is not None
        tokenizer = stated_config(weights, ema=ema)
    return NamedTokenizer(name=tokenizer.name, config=tokenizer)
