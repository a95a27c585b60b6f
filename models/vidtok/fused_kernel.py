"""The Triton kernel of `models.vidtok.fused`; imported on a GPU only, as not every torch comes with Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def norm_silu_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    y,
    rows,
    clip_rows,
    lead_rows,
    eps,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    """Norm, and SiLU of it, of ``rows`` rows of C channels; those of a clip lie behind ``lead_rows`` more in ``y``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    is_column = (column < C)[None, :]
    mask = (row < rows)[:, None] & is_column
    values = tl.load(x + row[:, None] * C + column[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(values, 1) / C
    centered = tl.where(is_column, values - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centered * centered, 1) / C + eps)
    gain = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
    normed = centered * scale[:, None] * gain[None, :] + shift[None, :]
    if SILU:
        rounded = normed.to(y.dtype.element_ty).to(tl.float32)
        normed = rounded / (1.0 + tl.exp(-rounded))
    place = row + (row // clip_rows + 1) * lead_rows
    tl.store(y + place[:, None] * C + column[None, :], normed.to(y.dtype.element_ty), mask=mask)
