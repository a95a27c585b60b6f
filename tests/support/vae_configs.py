"""Tiny configurations of the autoencoders of diffusers: values of their config.json, a name each."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor

from vidshard.models.diffusers_vae.config import DiffusersConfig
from vidshard.models.diffusers_vae.derive import config_from
from vidshard.models.diffusers_vae.model import DiffusersVae
from vidshard.models.tokenizer import Tokenizer
from vidshard.models.weights import load_tokenizer, seeded_weights

_WAN: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 3,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.5, -0.25, 1.0],
    "latents_std": [2.0, 4.0, 0.5],
}

CONFIGS: dict[str, dict[str, Any]] = {
    "wan-2.1": {"_class_name": "AutoencoderKLWan", **_WAN},
    "wan-2.2": {
        "_class_name": "AutoencoderKLWan",
        **_WAN,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
    },
    "qwen": {"_class_name": "AutoencoderKLQwenImage", **_WAN},
    "hunyuan": {
        "_class_name": "AutoencoderKLHunyuanVideo",
        "latent_channels": 3,
        "block_out_channels": [4, 4, 4, 4],
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "scaling_factor": 0.5,
    },
    "hunyuan-1.5": {
        "_class_name": "AutoencoderKLHunyuanVideo15",
        "latent_channels": 4,
        "block_out_channels": [8, 8, 8, 8, 8],
        "layers_per_block": 1,
    },
    "ltx": {
        "_class_name": "AutoencoderKLLTXVideo",
        "latent_channels": 4,
        "block_out_channels": [4, 4, 4, 4],
        "decoder_block_out_channels": [4, 4, 4, 4],
        "layers_per_block": [1, 1, 1, 1, 1],
        "decoder_layers_per_block": [1, 1, 1, 1, 1],
    },
    "ltx-2": {
        "_class_name": "AutoencoderKLLTX2Video",
        "latent_channels": 8,
        "block_out_channels": [8, 16, 32, 64],
        "decoder_block_out_channels": [8, 16, 32],
        "layers_per_block": [1, 1, 1, 1, 1],
        "decoder_layers_per_block": [1, 1, 1, 1],
    },
    "cogvideox": {
        "_class_name": "AutoencoderKLCogVideoX",
        "block_out_channels": [4, 4, 4, 4],
        "latent_channels": 3,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "scaling_factor": 0.75,
    },
    "mochi": {
        "_class_name": "AutoencoderKLMochi",
        "encoder_block_out_channels": [32, 32, 32, 32],
        "decoder_block_out_channels": [32, 32, 32, 32],
        "latent_channels": 2,
        "layers_per_block": [1, 1, 1, 1, 1],
        "latents_mean": [0.5, -0.5],
        "latents_std": [2.0, 4.0],
    },
    "cosmos": {
        "_class_name": "AutoencoderKLCosmos",
        "latent_channels": 2,
        "encoder_block_out_channels": [4, 4, 4, 4],
        "decode_block_out_channels": [4, 4, 4, 4],
        "attention_resolutions": [8],
        "resolution": 64,
        "num_layers": 1,
        "latents_mean": [0.25, 0.5, 0.75, 1.0, -0.25, -0.5, -0.75, -1.0],
        "latents_std": [1.0, 2.0, 3.0, 4.0, 0.5, 1.5, 2.5, 3.5],
    },
    "magvit": {
        "_class_name": "AutoencoderKLMagvit",
        "latent_channels": 3,
        "block_out_channels": [4, 4, 4, 4],
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
    "kvae-video": {
        "_class_name": "AutoencoderKLKVAEVideo",
        "ch": 32,
        "ch_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "z_channels": 2,
    },
    "kandinsky-6": {
        "_class_name": "Kandinsky6SRVAE",
        "latent_channels": 3,
        "encoder_block_out_channels": [4, 4, 4, 4, 4],
        "decoder_block_out_channels": [4, 4, 4, 4, 4],
        "layers_per_block": 1,
    },
    "minimax": {
        "_class_name": "AutoencoderKLMiniMaxH3",
        "latent_channels": 3,
        "block_out_channels": [4, 4, 4, 4, 4, 4],
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "decoder_num_layers": 1,
        "decoder_num_attention_heads": 1,
        "decoder_attention_head_dim": 16,
        "latents_mean": [0.5, -0.25, 1.0],
        "latents_std": [2.0, 4.0, 0.5],
    },
    "allegro": {
        "_class_name": "AutoencoderKLAllegro",
        "block_out_channels": [2, 2, 2, 2],
        "latent_channels": 2,
        "layers_per_block": 1,
        "norm_num_groups": 1,
        "sample_size": 128,
    },
    "svd": {"_class_name": "AutoencoderKLTemporalDecoder", "block_out_channels": [32], "latent_channels": 2},
    "sd": {"_class_name": "AutoencoderKL", "block_out_channels": [32], "latent_channels": 2, "shift_factor": 0.25},
    "taesd": {
        "_class_name": "AutoencoderTiny",
        "encoder_block_out_channels": [4, 4],
        "decoder_block_out_channels": [4, 4],
        "num_encoder_blocks": [1, 1],
        "num_decoder_blocks": [1, 1],
    },
    "dc": {
        "_class_name": "AutoencoderDC",
        "latent_channels": 4,
        "encoder_block_out_channels": [8, 8],
        "decoder_block_out_channels": [8, 8],
        "encoder_layers_per_block": [1, 1],
        "decoder_layers_per_block": [1, 1],
        "encoder_qkv_multiscales": [[], []],
        "decoder_qkv_multiscales": [[], []],
    },
    "kvae": {
        "_class_name": "AutoencoderKLKVAE",
        "channels": 32,
        "num_enc_blocks": 1,
        "num_dec_blocks": 1,
        "z_channels": 2,
        "ch_mult": [1, 1],
    },
    "flux-2": {
        "_class_name": "AutoencoderKLFlux2",
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
        "block_out_channels": [32, 32],
        "latent_channels": 2,
        "layers_per_block": 1,
    },
}


@cache
def config_of(name: str) -> DiffusersConfig:
    """The config that is derived from a configuration."""
    return config_from(CONFIGS[name])


@cache
def vae_of(name: str) -> DiffusersVae:
    """The network with the random weights of seed 0, the same one for every caller."""
    tokenizer: Tokenizer = load_tokenizer(config_of(name), None, seed=0)
    return cast(DiffusersVae, tokenizer)


def side_of(config: DiffusersConfig) -> int:
    """Height and width of small frames, in pixels."""
    return max(config.smallest_side, 2 * config.space_stride)


def clips(num_clips: int, num_frames: int, side: int) -> Tensor:
    """Noise in [-1, 1], the same each time: (B, 3, T, H, W)."""
    random = torch.Generator().manual_seed(num_frames)
    return torch.rand(num_clips, 3, num_frames, side, side, generator=random) * 2 - 1


def write_vae(folder: Path, name: str, *, weights: bool = True, **more: Any) -> Path:
    """Write a folder as a repository has it: config.json and, unless left out, the random weights of seed 0.

    Args:
        more: further settings of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_diffusers_version": "0.42.1", **CONFIGS[name], **more}))
    if weights:
        state = seeded_weights(config_of(name), 0)
        safetensors.torch.save_file(state, folder / "diffusion_pytorch_model.safetensors")
    return folder
