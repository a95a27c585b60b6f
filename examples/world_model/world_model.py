"""A small world model: predicts the next latent frame from those before it, and from actions.

    python examples/world_model/world_model.py demo-out/tokens --out runs/world

It reads tokens or latents with `vidshard.TokenShards`, trains in this process or with Ray Train on several, continues
where it stopped, and writes a sampled continuation beside the truth. Copy it and change it.

Shapes: B clips, T latent frames, N positions of a frame, C channels (levels of a token, or values of a latent).
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import vidshard


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run is made of; each field is a flag."""

    tokens: str  # output of `vidshard tokenize`
    out: str = "world"  # folder of the run; the same command again continues it
    actions: str = ""  # name of a signal, stored with `vidshard tokenize --signals`; empty for none
    steps: int = 100
    batch_size: int = 1  # clips of one process and step
    workers: int = 0  # processes of Ray Train; 0 trains in this process
    width: int = 96
    depth: int = 3
    heads: int = 4
    learning_rate: float = 2e-3
    save_every: int = 20
    seed: int = 0
    prompt: int = 2  # latent frames that the sampled continuation is given
    temperature: float = 0.5


class Codec:
    """Payload as channels, and what the network predicts for them: levels of a token, or a Gaussian for a latent."""

    def __init__(self, provenance: Any) -> None:
        """Take the column and its codebook from an output's provenance."""
        if len(provenance.payload) > 1:
            raise SystemExit("the clips have several payloads, as those of VidTwin; this example is made for one")
        column = provenance.payload[0]
        self.name, self.shape = column.name, tuple(column.shape)
        levels = provenance.tokenizer.get("fsq_levels") or [column.codebook_size]
        self.levels = [int(level) for level in levels] if column.codebook_size else []
        self.channels = len(self.levels) or self.shape[0]
        self.num_positions = self.shape[-2] * self.shape[-1]
        self.num_inputs = sum(self.levels) or self.channels
        self.num_outputs = sum(self.levels) or 2 * self.channels

    def split(self, values: Tensor) -> Tensor:
        """Tokens (B, T, H, W) to levels int64 (B, T, N, C); latents (B, C, T, H, W) to float32 (B, T, N, C)."""
        if not self.levels:
            return values.float().flatten(3).permute(0, 2, 3, 1)
        rest = values.long().flatten(2)
        parts = []
        for level in self.levels:
            parts.append(rest % level)
            rest = rest // level
        return torch.stack(parts, -1)

    def join(self, x_BTNC: Tensor) -> np.ndarray:
        """Inverse of `split` for one clip, in the dtype of the shard."""
        frames = (x_BTNC.shape[1], *self.shape[-2:])
        if not self.levels:
            return x_BTNC[0].permute(2, 0, 1).reshape(self.channels, *frames).numpy().astype(np.float16)
        places = torch.tensor(np.cumprod([1, *self.levels[:-1]]))
        return (x_BTNC[0] * places).sum(-1).reshape(frames).numpy().astype(np.uint32)

    def inputs(self, x: Tensor) -> Tensor:
        """Channels (..., C) as numbers for a linear layer, (..., num_inputs): levels one-hot, latents as they are."""
        if not self.levels:
            return x
        hot = [functional.one_hot(x[..., i], level) for i, level in enumerate(self.levels)]
        return torch.cat(hot, -1).float()

    def bits(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Mean bits of a token, or of a value of a latent, under the prediction (..., num_outputs)."""
        if self.levels:
            parts = zip(outputs.split(self.levels, -1), target.unbind(-1), strict=True)
            nats = sum(functional.cross_entropy(o.flatten(0, -2), t.flatten()) for o, t in parts)
        else:
            mean, log_variance = outputs.chunk(2, -1)
            log_variance = log_variance.clamp(-12, 12)
            nats = 0.5 * ((target - mean) ** 2 / log_variance.exp() + log_variance + math.log(2 * math.pi)).mean()
        return torch.as_tensor(nats) / math.log(2)

    def sample(self, outputs: Tensor, temperature: float) -> Tensor:
        """Draw channels (..., C) from the prediction."""
        if self.levels:
            parts = [torch.distributions.Categorical(logits=o / temperature) for o in outputs.split(self.levels, -1)]
            return torch.stack([part.sample() for part in parts], -1)
        mean, log_variance = outputs.chunk(2, -1)
        return mean + temperature * (0.5 * log_variance.clamp(-12, 12)).exp() * torch.randn_like(mean)


class Block(nn.Module):
    """Attention within a frame, then over the frames before at the same position, then an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BTND: Tensor) -> Tensor:
        x = x_BTND + self._attend(0, x_BTND, causal=False)
        x = x + self._attend(1, x.transpose(1, 2), causal=True).transpose(1, 2)
        return x + self.mlp(self.norms[2](x))

    def _attend(self, i: int, x: Tensor, *, causal: bool) -> Tensor:
        q, k, v = self.qkv[i](self.norms[i](x)).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        mixed = functional.scaled_dot_product_attention(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), is_causal=causal
        )
        return self.out[i](mixed.unflatten(0, x.shape[:2]).transpose(2, 3).flatten(3))


class WorldModel(nn.Module):
    """Causal transformer over latent frames; its output at frame t is the prediction of frame t + 1."""

    def __init__(self, codec: Codec, config: Config, num_actions: int) -> None:
        super().__init__()
        width = config.width
        self.codec, self.embed = codec, nn.Linear(codec.num_inputs, width)
        self.skip = nn.Linear(codec.num_inputs, codec.num_outputs)  # a frame is much like the one before it
        nn.init.zeros_(self.skip.weight)
        self.place = nn.Parameter(0.02 * torch.randn(codec.num_positions, width))
        self.time = nn.Parameter(0.02 * torch.randn(64, 1, width))
        self.act = nn.Linear(num_actions, width) if num_actions else None
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, codec.num_outputs))

    def forward(self, x_BTNC: Tensor, actions_BTA: Tensor | None = None) -> Tensor:
        """Predictions (B, T, N, num_outputs) of the frames after each one.

        Args:
            actions_BTA: the actions that lead from each frame to the next.
        """
        inputs = self.codec.inputs(x_BTNC)
        h = self.embed(inputs) + self.place + self.time[: x_BTNC.shape[1]]
        if self.act is not None and actions_BTA is not None:
            h = h + self.act(actions_BTA)[:, :, None]
        for block in self.blocks:
            h = block(h)
        return torch.as_tensor(self.head(h) + self.skip(inputs))


def open_shards(config: Config, **how: Any) -> vidshard.TokenShards:
    """The clips of a run; rank and world size are those of torch.distributed."""
    signals = config.actions or None
    return vidshard.TokenShards(config.tokens, signals=signals, signals_per="latent", seed=config.seed, **how)


def examples(batch: dict[str, Any], codec: Codec, config: Config) -> tuple[Tensor, Tensor | None]:
    """Channels (B, T, N, C), and the mean action (B, T - 1, A) that leads to each frame but the first."""
    if not config.actions:
        return codec.split(batch[codec.name]), None
    mask = batch[f"{config.actions}_mask"][..., None]
    mean = (batch[config.actions] * mask).sum(2) / mask.sum(2).clamp(min=1)
    return codec.split(batch[codec.name]), mean[:, 1:].float()


def train(config: Config) -> None:
    """Train in this process, which may be one of several of Ray Train; continues the run of ``config.out``."""
    torch.manual_seed(config.seed)
    shards = open_shards(config, batch_size=config.batch_size, shuffle=True)
    codec = Codec(shards.provenance)
    loader = shards.loader()
    first = examples(next(iter(open_shards(config, batch_size=1))), codec, config)[1]
    inner = WorldModel(codec, config, 0 if first is None else first.shape[-1])
    path = Path(config.out) / "state.pt"
    step, state = 0, torch.load(path, weights_only=True) if path.exists() else None
    if state is not None:
        inner.load_state_dict(state["model"])
        loader.load_state_dict(state["data"])  # the clips that are still to come, for any number of processes
        step = state["step"]
    model, is_first = inner, True
    if torch.distributed.is_initialized():
        from ray.train.torch import prepare_model

        model, is_first = prepare_model(inner), torch.distributed.get_rank() == 0
    device = next(model.parameters()).device
    fast, slow = list(inner.skip.parameters()), [p for name, p in inner.named_parameters() if "skip" not in name]
    groups = [{"params": slow}, {"params": fast, "lr": 10 * config.learning_rate}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    started = time.monotonic()
    while step < config.steps:
        for batch in loader:
            x, actions = examples(batch, codec, config)
            x, actions = x.to(device), None if actions is None else actions.to(device)
            loss = codec.bits(model(x[:, :-1], actions), x[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if is_first and (step % config.save_every == 0 or step == config.steps):
                now = {"model": inner.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(now | {"data": loader.state_dict()}, path.with_suffix(".new"))
                os.replace(path.with_suffix(".new"), path)
                print(f"step {step}: {loss:.3f} bits, {time.monotonic() - started:.0f} s", flush=True)
            if step == config.steps:
                return


def bigram_bits(codec: Codec, data: list[Tensor]) -> float:
    """Bits of a model that knows, for each channel, only the same place one frame before; fitted to the same clips."""
    before = torch.cat([x[:, :-1].flatten(0, 2) for x in data])
    after = torch.cat([x[:, 1:].flatten(0, 2) for x in data])
    if codec.levels:
        bits = 0.0
        for channel, level in enumerate(codec.levels):
            pair = before[:, channel], after[:, channel]
            counts = torch.ones(level, level).index_put(pair, torch.tensor(1.0), accumulate=True)
            bits -= float((counts / counts.sum(1, keepdim=True)).log2()[pair].mean())
        return bits
    slope = ((before - before.mean(0)) * (after - after.mean(0))).mean(0) / before.var(0, correction=0)
    rest = (after - after.mean(0) - slope * (before - before.mean(0))).var(0, correction=0)
    return float(0.5 * (rest.log() + math.log(2 * math.pi) + 1).mean() / math.log(2))


@torch.inference_mode()
def finish(config: Config) -> None:
    """Compare with the bigram model, and write a continuation: the truth at the left, the sample at the right."""
    output = vidshard.open_output(config.tokens)
    codec = Codec(output.provenance)
    pairs = [examples(batch, codec, config) for batch in itertools.islice(open_shards(config, batch_size=1), 64)]
    model = WorldModel(codec, config, 0 if pairs[0][1] is None else pairs[0][1].shape[-1]).eval()
    model.load_state_dict(torch.load(Path(config.out) / "state.pt", weights_only=True)["model"])
    bits = sum(float(codec.bits(model(x[:, :-1], actions), x[:, 1:])) for x, actions in pairs) / len(pairs)
    unit, simple = "a token" if codec.levels else "a value", bigram_bits(codec, [x for x, _ in pairs])
    print(f"world model {bits:.3f} bits {unit}, bigram model {simple:.3f}, of {len(pairs)} clips")
    torch.manual_seed(config.seed)
    x, actions = pairs[0]
    sampled = x[:, : config.prompt]
    while sampled.shape[1] < x.shape[1]:
        given = None if actions is None else actions[:, : sampled.shape[1]]
        sampled = torch.cat([sampled, codec.sample(model(sampled, given)[:, -1:], config.temperature)], 1)
    clip = next(output.clips())
    made = replace(clip, payload={codec.name: codec.join(sampled).astype(clip.payload[codec.name].dtype)})
    both = np.concatenate([output.reconstruct(clip), output.reconstruct(made)], axis=2)
    write_video(Path(config.out) / "continuation.mp4", both, round(float(clip.values["fps"])))


def write_video(path: Path, frames_THWC: np.ndarray, fps: int) -> None:
    """Write uint8 frames as H.264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames_THWC.shape[1:3], "yuv420p"
        for frame in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens")
    for field in fields(Config)[1:]:
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    config = Config(**vars(parser.parse_args()))
    config = replace(config, out=str(Path(config.out).absolute()), tokens=os.path.abspath(config.tokens))
    Path(config.out).mkdir(parents=True, exist_ok=True)
    if config.workers:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        TorchTrainer(
            lambda given: train(Config(**given)),
            train_loop_config=asdict(config),
            scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=torch.cuda.is_available()),
            run_config=RunConfig(storage_path=config.out, name=f"ray-{os.getpid()}"),
        ).fit()
    else:
        train(config)
    finish(config)


if __name__ == "__main__":
    main()
