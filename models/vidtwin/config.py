"""Configuration of VidTwin tokenizers, and the table of their presets.

VidTwin (Wang et al., "VidTwin: Video VAE with Decoupled Structure and Dynamics", CVPR 2025) splits a clip into a
structure latent (content and slow motion) and two dynamics latents (fast motion, by column and by row). A
`VidTwinConfig` describes a network completely; `PRESETS` holds a row for each known model. No weights and no
computation stand here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from vidshard.schemas.tokenizers import ClipShape, TokenizerConfig
from vidshard.schemas.tokens import Payload, PayloadColumn


class VidTwinConfig(TokenizerConfig):
    """A VidTwin tokenizer, described completely: two equal configs are the same network."""

    family: Literal["vidtwin"] = "vidtwin"
    architecture: Literal[
        "released", "no-disentanglement", "no-dynamics-average", "no-structure-qformer", "no-moved-positions"
    ] = "released"
    """Released structure, or one of the ablations (a) to (d) of the paper's Table 3, see `branches`."""
    num_frames: int = Field(default=16, ge=1, le=1024)
    """Frames per clip. The model takes no other length."""
    frame_size: int = Field(default=224, ge=8, le=4096)
    """Height and width of a frame in pixels. The model takes no other size."""
    patch_size: int = Field(default=16, ge=1, le=256)
    """Height and width in pixels of the patch that becomes one token."""
    width: int = Field(default=768, ge=4, le=16384)
    """Channels of the tokens, in encoder and decoder."""
    depth: int = Field(default=16, ge=1, le=256)
    """Blocks of the encoder, and of the decoder."""
    num_heads: int = Field(default=12, ge=1, le=1024)
    """Attention heads of a block."""
    num_queries: int = Field(default=16, ge=1, le=1024)
    """Structure queries: the Q-Former's summary of all frames, at each position."""
    query_width: int = Field(default=64, ge=8, le=4096)
    """Channels of the structure queries."""
    qformer_layers: int = Field(default=6, ge=1, le=64)
    """Layers of a Q-Former; those with an even index read the frames."""
    qformer_mlp_width: int = Field(default=768, ge=1, le=65536)
    structure_width: int = Field(default=128, ge=1, le=4096)
    """Channels of the first structure convolution; each halving doubles them."""
    structure_halvings: int = Field(default=1, ge=0, le=8)
    """Number of times that height and width of the structure latent are halved, rounding up."""
    structure_channels: int = Field(default=8, ge=1, le=1024)
    """Channels of the structure latent."""
    dynamics_halvings: int = Field(default=1, ge=0, le=8)
    """Number of times that the positions of the dynamics latents are halved, rounding up; 0 leaves out the strided
    convolutions and the layers that restore the positions."""
    dynamics_channels: int = Field(default=8, ge=1, le=1024)
    """Channels of the dynamics latents."""
    dynamics_queries: int = Field(default=14, ge=1, le=1024)
    """Queries of each frame in the architecture ``no-dynamics-average``; the others have none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.frame_size % self.patch_size:
            raise ValueError(
                f"{self.name}: patch_size must divide frame_size, got {self.patch_size} and {self.frame_size}"
            )
        if self.width % 4 or self.width % self.num_heads:
            raise ValueError(
                f"{self.name}: width must be a multiple of 4 and of num_heads, got {self.width} and {self.num_heads}"
            )
        if self.query_width % QFORMER_HEADS:
            raise ValueError(f"{self.name}: query_width must be a multiple of {QFORMER_HEADS}, got {self.query_width}")
        if self.architecture == "no-disentanglement" and self.num_queries != self.num_frames:
            raise ValueError(
                f"{self.name}: without disentanglement the frames take the queries' place, so num_queries must be "
                f"num_frames, {self.num_frames}; got {self.num_queries}"
            )
        return self

    @property
    def grid(self) -> int:
        """Patches of a frame along height, and along width."""
        return self.frame_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """Patches of a frame."""
        return self.grid**2

    @property
    def structure_size(self) -> int:
        """Height and width of the structure latent."""
        return _halved(self.grid, self.structure_halvings)

    @property
    def dynamics_size(self) -> int:
        """Positions of each dynamics latent."""
        return _halved(self.grid, self.dynamics_halvings)

    @property
    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a clip's latents by payload column, channels last."""
        structure: tuple[int, ...]
        structure = (self.num_queries, self.structure_size, self.structure_size, self.structure_channels)
        dynamics = (self.num_frames, self.dynamics_size, self.dynamics_channels)
        if self.architecture == "no-disentanglement":
            return {"structure": structure}
        if self.architecture == "no-dynamics-average":
            queries = (self.num_frames, self.dynamics_queries, self.dynamics_channels)
            return {"structure": structure, "dynamics": queries}
        if self.architecture == "no-moved-positions":
            structure = (self.num_queries, self.query_width)
        return {"structure": structure, "dynamics_x": dynamics, "dynamics_y": dynamics}

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """Structure and dynamics; an ablation without dynamics has structure alone."""
        dynamics = tuple(name for name in self.latent_shapes if name.startswith("dynamics"))
        return {"structure": ("structure",), **({"dynamics": dynamics} if dynamics else {})}

    @property
    def is_causal(self) -> bool:
        """False: the structure latent sees all frames."""
        return False

    @property
    def time_stride(self) -> int:
        """1: each frame has dynamics of its own."""
        return 1

    @property
    def space_stride(self) -> int:
        """Pixels of a patch."""
        return self.patch_size

    @property
    def codebook_size(self) -> int | None:
        """None: latents are continuous."""
        return None

    @property
    def head_name(self) -> str:
        """``kl``, for each latent."""
        return "kl"

    @property
    def has_logvar(self) -> bool:
        """True, for each latent."""
        return True

    @property
    def history_frames(self) -> int:
        """All frames of a clip but the last."""
        return self.num_frames - 1

    @property
    def history_latents(self) -> int:
        """0: clips are decoded whole."""
        return 0

    @property
    def lookahead_latents(self) -> int:
        """0: clips are decoded whole."""
        return 0

    @property
    def default_clip(self) -> ClipShape:
        """The only clip that the model takes."""
        return ClipShape(num_frames=self.num_frames, height=self.frame_size, width=self.frame_size)

    @property
    def takes_tiles(self) -> bool:
        """False: the position codes are those of whole frames."""
        return False

    def latent_frames(self, num_frames: int) -> int:
        """Number of frames with dynamics of their own: all of a clip.

        Raises:
            ValueError: the clip has another length than the model's.
        """
        if num_frames != self.num_frames:
            raise ValueError(f"{self.name}: clips have {self.num_frames} frames, no other length; got {num_frames}")
        return num_frames

    def decoded_frames(self, latent_frames: int) -> int:
        """Number of frames of a decoded clip."""
        return latent_frames

    def valid_frames(self, num_frames: int) -> int:
        """The model's clip length, for clips that are no longer.

        Raises:
            ValueError: num_frames is below 1 or above the clip length.
        """
        if not 1 <= num_frames <= self.num_frames:
            raise ValueError(
                f"{self.name}: clips have {self.num_frames} frames, and shorter ones can be padded; got {num_frames}"
            )
        return self.num_frames

    def payload(self, num_frames: int, height: int, width: int, *, keep_logvar: bool = False) -> Payload:
        """Float16 columns of a clip, each followed by its log-variance if that is kept.

        Raises:
            ValueError: the clip has another length or size than the model's.
        """
        self.check_clip(num_frames, height, width)
        names = ("", "_logvar") if keep_logvar else ("",)
        return tuple(
            PayloadColumn(name=f"{column}{suffix}", shape=shape, dtype="float16")
            for column, shape in self.latent_shapes.items()
            for suffix in names
        )

    def check_clip(self, num_frames: int, height: int, width: int) -> None:
        """Check that the model takes a clip.

        Raises:
            ValueError: the clip has another length or size than the model's.
        """
        self.latent_frames(num_frames)
        if (height, width) != (self.frame_size, self.frame_size):
            raise ValueError(
                f"{self.name}: frames are {self.frame_size}x{self.frame_size}, no other size; got {height}x{width}"
            )


QFORMER_HEADS = 8
"""Attention heads of a Q-Former, whatever its width."""


def _halved(size: int, times: int) -> int:
    return -(-size // (1 << times))


_BASE: dict[str, Any] = {}
_SMALL: dict[str, Any] = {"depth": 12, "num_heads": 8, "width": 512}
_LARGE: dict[str, Any] = {"width": 1536}
_TINY: dict[str, Any] = {
    "num_frames": 8,
    "frame_size": 64,
    "patch_size": 16,
    "width": 64,
    "depth": 1,
    "num_heads": 4,
    "num_queries": 4,
    "query_width": 64,
    "qformer_layers": 1,
    "qformer_mlp_width": 128,
    "structure_width": 32,
    "structure_halvings": 0,
    "dynamics_channels": 2,
}
_SETTING_1: dict[str, Any] = {"structure_channels": 4}
_SETTING_2: dict[str, Any] = {"structure_channels": 4, "dynamics_halvings": 2, "dynamics_channels": 16}
_SETTING_3: dict[str, Any] = {"structure_channels": 4, "num_queries": 12}


def _row(name: str, *parts: dict[str, Any], **fields: Any) -> VidTwinConfig:
    merged: dict[str, Any] = {"name": name}
    for part in (*parts, fields):
        merged |= part
    return VidTwinConfig.model_validate(merged)


PRESETS: dict[str, VidTwinConfig] = {
    config.name: config
    for config in (
        # For tests, demos and laptops: no trained weights exist. Small dynamics leave the pictures to the structure.
        _row("vidtwin_tiny", _TINY),
        # The release.
        _row("vidtwin_structure_7_7_8_dynamics_7_8", _BASE),
        # The paper's settings 1 to 3 (Table 5), size base. Setting 1 is its main model. No weights were released.
        _row("vidtwin_structure_7_7_4_dynamics_7_8", _BASE, _SETTING_1),
        _row("vidtwin_structure_7_7_4_dynamics_4_16", _BASE, _SETTING_2),
        _row("vidtwin_structure_7_7_4_q12_dynamics_7_8", _BASE, _SETTING_3),
        # The paper's other sizes (Table 4), with setting 1.
        _row("vidtwin_small_structure_7_7_4_dynamics_7_8", _SMALL, _SETTING_1),
        _row("vidtwin_large_structure_7_7_4_dynamics_7_8", _LARGE, _SETTING_1),
        # The ablations (a) to (d) of Table 3. No code was released: what each replaces is our choice, made so that the
        # latents are about as large as those of setting 1 (4928 numbers).
        _row("vidtwin_no_disentanglement", _BASE, architecture="no-disentanglement", structure_channels=6),
        _row("vidtwin_no_dynamics_average", _BASE, _SETTING_1, architecture="no-dynamics-average"),
        _row("vidtwin_no_structure_qformer", _BASE, _SETTING_1, architecture="no-structure-qformer"),
        _row("vidtwin_no_moved_positions", _BASE, _SETTING_1, architecture="no-moved-positions", query_width=192),
    )
}
