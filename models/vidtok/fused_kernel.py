"""The Triton kernels of `models.vidtok.fused`; imported on a GPU only, as not every torch comes with Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def norm_silu_kernel(  # type: ignore[no-untyped-def]
    x,
    residual,
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
    RESIDUAL: tl.constexpr,
):
    """Norm, and SiLU of it, of ``rows`` rows of C channels; those of a clip lie behind ``lead_rows`` more in ``y``.

    With RESIDUAL the rows of ``residual`` are added first, and the sum is written back into ``x``.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    is_column = (column < C)[None, :]
    mask = (row < rows)[:, None] & is_column
    source = row[:, None] * C + column[None, :]
    values = tl.load(x + source, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        values += tl.load(residual + source, mask=mask, other=0.0).to(tl.float32)
        total = values.to(x.dtype.element_ty)
        tl.store(x + source, total, mask=mask)
        values = total.to(tl.float32)
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


@triton.jit  # type: ignore[untyped-decorator]
def sum_taps_kernel(  # type: ignore[no-untyped-def]
    products,
    first,
    second,
    share,
    y,
    num_frames,
    num_outputs,
    frame_values,
    num_blocks,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    MIXED: tl.constexpr,
):
    """Sum the products of three taps, (frames, positions, 3 C), into output frames (positions, C).

    Tap k of output j is that of source frame ``first[j + k]``, or with MIXED the interpolation between it and frame
    ``second[j + k]``; frame -1 is one of zeros.
    """
    program = tl.program_id(0).to(tl.int64)
    output = program // num_blocks
    value = program % num_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = value < frame_values
    clip_frame = output // num_outputs * num_frames
    number = output % num_outputs
    place = value // C * (3 * C) + value % C
    total = tl.zeros((BLOCK,), tl.float32)
    for tap in tl.static_range(3):
        frame = tl.load(first + number + tap)
        at = products + (clip_frame + tl.maximum(frame, 0)) * frame_values * 3 + tap * C
        term = tl.where(frame >= 0, tl.load(at + place, mask=mask, other=0.0).to(tl.float32), 0.0)
        if MIXED:
            other_frame = tl.load(second + number + tap)
            weight = tl.load(share + number + tap)
            at = products + (clip_frame + tl.maximum(other_frame, 0)) * frame_values * 3 + tap * C
            other = tl.where(other_frame >= 0, tl.load(at + place, mask=mask, other=0.0).to(tl.float32), 0.0)
            low = term + weight * (other - term)
            high = other - (other - term) * (1.0 - weight)
            term = tl.where(weight < 0.5, low, high).to(y.dtype.element_ty).to(tl.float32)  # as torch.lerp
        total = (total + term).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + output * frame_values + value, total.to(y.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def conv_norm_silu_kernel(  # type: ignore[no-untyped-def]
    x,
    kernel,
    bias,
    residual,
    gain,
    shift,
    total,
    y,
    B,
    T,
    H,
    W,
    eps,
    INPUTS: tl.constexpr,
    C: tl.constexpr,
    TIME_TAPS: tl.constexpr,
    SPACE_TAPS: tl.constexpr,
    BEFORE: tl.constexpr,
    REPEAT_FIRST: tl.constexpr,
    RESIDUAL: tl.constexpr,
    KEEP_TOTAL: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Convolution, bias and residual of one tile of a frame (ROWS x COLUMNS positions, all C channels), norm and SiLU.

    ``x`` is (B, T, H, W, INPUTS) and ``kernel`` (C, taps, INPUTS). Tiles are read as boxes of a tensor descriptor,
    which fills what lies outside of the map with zeros. Output frame t sees the frames from ``t - BEFORE`` on; with
    REPEAT_FIRST, frames before the first one are copies of it. ``y`` gets norm and SiLU, ``total`` with KEEP_TOTAL the
    sum before them. Without NORM there is only ``total``.
    """
    POSITIONS: tl.constexpr = ROWS * COLUMNS
    SQUARE: tl.constexpr = SPACE_TAPS * SPACE_TAPS
    STEPS: tl.constexpr = INPUTS // STEP
    x_boxes = tl.make_tensor_descriptor(
        x,
        [B, T, H, W, INPUTS],
        [T * H * W * INPUTS, H * W * INPUTS, W * INPUTS, INPUTS, 1],
        [1, 1, ROWS, COLUMNS, STEP],
    )
    kernel_boxes = tl.make_tensor_descriptor(
        kernel,
        [C, TIME_TAPS * SQUARE * INPUTS],
        [TIME_TAPS * SQUARE * INPUTS, 1],
        [C, STEP],
    )
    tiles_across = tl.cdiv(W, COLUMNS)
    tiles_down = tl.cdiv(H, ROWS)
    program = tl.program_id(0)
    first_column = program % tiles_across * COLUMNS
    first_row = program // tiles_across % tiles_down * ROWS
    frame = program // (tiles_across * tiles_down)
    clip = frame // T
    time = frame % T
    sums = tl.zeros((POSITIONS, C), tl.float32)
    for step in range(TIME_TAPS * SQUARE * STEPS):
        tap = step // STEPS
        seen = time + tap // SQUARE - BEFORE
        if REPEAT_FIRST:
            seen = tl.maximum(seen, 0)
        box = x_boxes.load(
            [
                clip,
                seen,
                first_row + tap % SQUARE // SPACE_TAPS - SPACE_TAPS // 2,
                first_column + tap % SPACE_TAPS - SPACE_TAPS // 2,
                step % STEPS * STEP,
            ]
        )
        taps = kernel_boxes.load([0, step * STEP])
        sums = tl.dot(box.reshape(POSITIONS, STEP), taps.T, sums, input_precision="ieee")
    channel = tl.arange(0, C)
    sums += tl.load(bias + channel).to(tl.float32)[None, :]
    position = tl.arange(0, POSITIONS)
    row = first_row + position // COLUMNS
    column = first_column + position % COLUMNS
    mask = ((row < H) & (column < W))[:, None]
    at = ((row * W + column) * C)[:, None] + channel[None, :]  # within a frame, in int32: addresses take registers
    start = frame.to(tl.int64) * (H * W * C)
    sums = sums.to(y.dtype.element_ty).to(tl.float32)
    if RESIDUAL:
        sums += tl.load(residual + start + at, mask=mask, other=0.0).to(tl.float32)
        sums = sums.to(y.dtype.element_ty).to(tl.float32)
    if KEEP_TOTAL:
        tl.store(total + start + at, sums.to(y.dtype.element_ty), mask=mask)
    if NORM:
        centered = sums - (tl.sum(sums, 1) / C)[:, None]
        scale = tl.rsqrt(tl.sum(centered * centered, 1) / C + eps)
        normed = centered * scale[:, None] * tl.load(gain + channel).to(tl.float32)[None, :]
        normed += tl.load(shift + channel).to(tl.float32)[None, :]
        normed = normed.to(y.dtype.element_ty).to(tl.float32)
        normed = normed / (1.0 + tl.exp(-normed))
        tl.store(y + start + at, normed.to(y.dtype.element_ty), mask=mask)
