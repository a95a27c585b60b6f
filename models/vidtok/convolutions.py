"""Convolutions of channels-last maps, by the operator that is fastest for a shape, whatever the batch.

On a CPU without gradients, a large map passes through a layer in blocks that fit the cache (`blocks`): whole frames
where the layer works within frames, rows of all frames where it works through time.
"""

# B batch, T frames, H height, W width, C channels; F = B * T; N = H * W positions of one frame

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def conv2d(x_BTHWC: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1, padding: int = 0) -> Tensor:
    """Apply a 2D convolution to each frame."""
    B, T = x_BTHWC.shape[:2]
    y_FCHW = F.conv2d(x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2), weight, bias, stride, padding)
    y_FHWC = y_FCHW.permute(0, 2, 3, 1).contiguous()
    return y_FHWC.view(B, T, *y_FHWC.shape[1:])


def conv_over_time(x_BTHWC: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a 1D convolution along time at each position, without padding; ``weight`` is (out, in, time)."""
    B, _, H, W, _ = x_BTHWC.shape
    if x_BTHWC[0].numel() <= SMALL_MAP:
        return F.linear(stack_taps(x_BTHWC, weight.shape[2]), weight.transpose(1, 2).flatten(1), bias)
    # As a (time, 1) convolution over an image of T rows and H * W columns: at 20 frames of 128 x 128 x 128 channels
    # 0.26 s on two cores, as fast as three matrix products or a 3D convolution, and 1.9 times faster at 512 channels.
    y_BCTN = F.conv2d(x_BTHWC.flatten(2, 3).permute(0, 3, 1, 2), weight.unsqueeze(-1), bias)
    y_BTNC = y_BCTN.permute(0, 2, 3, 1).contiguous()
    return y_BTNC.view(B, y_BTNC.shape[1], H, W, y_BTNC.shape[3])


def conv3d(x_BTHWC: Tensor, weight: Tensor, bias: Tensor | None, *, time_stride: int = 1) -> Tensor:
    """Apply a 3D convolution without padding in time, and with zero padding that keeps the size in space."""
    B, T, H, W, C = x_BTHWC.shape
    out_channels, _, taps = weight.shape[:3]
    num_frames = (T - taps) // time_stride + 1
    cuts = blocks(x_BTHWC, weight, num_frames, H * W * max(C, out_channels))
    if len(cuts) == 1:
        return _conv3d(x_BTHWC, weight, bias, time_stride)
    y_BTHWC = x_BTHWC.new_empty(B, num_frames, H, W, out_channels)
    for clip in range(B):
        for cut in cuts:
            seen = slice(cut.start * time_stride, (cut.stop - 1) * time_stride + taps)
            y_BTHWC[clip, cut] = _conv3d(x_BTHWC[clip : clip + 1, seen], weight, bias, time_stride)[0]
    return y_BTHWC


def _conv3d(x_BTHWC: Tensor, weight: Tensor, bias: Tensor | None, time_stride: int) -> Tensor:
    out_channels, in_channels, taps = weight.shape[:3]
    # The first and last layers have few channels, where 3D convolutions are slow: on two cores at 20 frames of
    # 128 x 128, 3 to 128 channels take 237 ms, 128 to 3 take 131 ms. As 2D convolutions with the taps as additional
    # input or output channels they take 88 and 49 ms.
    if time_stride == 1 and taps * out_channels <= in_channels:
        y = conv2d(x_BTHWC, weight.permute(2, 0, 1, 3, 4).flatten(0, 1), None, padding=1)
        num_frames = x_BTHWC.shape[1] - taps + 1
        by_tap = [part[:, tap : tap + num_frames] for tap, part in enumerate(y.chunk(taps, dim=-1))]
        total = torch.stack(by_tap).sum(0)
        return total if bias is None else total + bias
    if taps * in_channels <= out_channels or x_BTHWC[0, :, :, 0].numel() <= SMALL_MAP:
        stacked = stack_taps(x_BTHWC, taps, time_stride)
        return conv2d(stacked, weight.transpose(1, 2).flatten(1, 2), bias, padding=1)
    y_BCTHW = F.conv3d(x_BTHWC.permute(0, 4, 1, 2, 3), weight, bias, (time_stride, 1, 1), (0, 1, 1))
    return y_BCTHW.permute(0, 2, 3, 4, 1).contiguous()


def matrix_product(x_BTHWC: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply the channels of each position by an (out, in) matrix."""
    _, T, H, _, _ = x_BTHWC.shape
    if x_BTHWC.device.type != "cpu" or x_BTHWC[0].numel() <= SMALL_MAP or T * H < 16:
        return F.linear(x_BTHWC, weight, bias)
    # PyTorch multiplies with MKL and convolves with oneDNN: on an AMD processor with AVX-512, a product of 512 channels
    # runs at 186 GFLOP/s with the former and at 424 with the latter. The convolution's batch is rows, not frames: on a
    # single thread a batch below 16 does not reach oneDNN.
    y_RC1W = F.conv2d(x_BTHWC.flatten(0, 2)[:, None].permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    return y_RC1W.permute(0, 2, 3, 1).reshape(*x_BTHWC.shape[:-1], weight.shape[0])


BLOCK_VALUES = 2 << 20
"""Number of values in a block. On two cores in float32, a `TimeUnit` takes 780 ms for 20 frames of 128 x 128 x 128
channels without blocks, and 275, 320 and 650 ms in blocks of 1.3, 2.6 and 5.2 million values; at 256 x 256, 3.4 s
without and 1.0 s with blocks. A `SpatialUnit` takes 0.75 s without and 0.57 s with them."""


def blocks(x: Tensor, weight: Tensor, count: int, values: int) -> list[slice]:
    """Cut ``count`` frames or rows of ``values`` values each into blocks for a layer with this weight.

    Returns:
        Consecutive ranges; a single one on a GPU, and where gradients are recorded.
    """
    recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    size = count if x.device.type != "cpu" or recorded else max(1, BLOCK_VALUES // values)
    return [slice(start, min(start + size, count)) for start in range(0, count, max(size, 1))]


# Values of a map up to which PyTorch's CPU convolutions take another path for a batch of one (5D: the first three
# sizes after the batch; 4D: the whole map). That path is slower and gives other bits than larger batches do: a clip's
# latents would depend on its batch, by 1e-5. Maps this small are computed as 2D convolutions over B * T frames, or as
# matrix products, whatever the batch. The exception left is a batch of one clip of one such frame.
SMALL_MAP = 20480


def stack_taps(x_BTHWC: Tensor, taps: int, time_stride: int = 1) -> Tensor:
    """Concatenate, along the channels, the frames that each output frame of a convolution over time sees."""
    last = x_BTHWC.shape[1] - taps + 1
    return torch.cat([x_BTHWC[:, tap : tap + last : time_stride] for tap in range(taps)], dim=-1)
