"""Published results of the papers, for tables beside ours.

VidTok: Tang et al., 2024, Tables 1 and 5 and the model card; 30 frames per second, 17x256x256 for causal and 16x256x256
for other models. VidTwin: Wang et al., CVPR 2025, Table 1; 25 frames per second, 16x224x224.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Figures of one model on one data set: PSNR in dB, SSIM, LPIPS with VGG, and FVD."""

    psnr: float
    ssim: float
    lpips: float
    fvd: float


def _row(psnr: float, ssim: float, lpips: float, fvd: float) -> Published:
    return Published(psnr=psnr, ssim=ssim, lpips=lpips, fvd=fvd)


PUBLISHED: dict[str, dict[str, Published]] = {
    "MCL-JCV": {
        "kl_causal_488_4chn": _row(29.64, 0.852, 0.114, 194.2),
        "kl_causal_488_8chn": _row(31.83, 0.897, 0.083, 109.3),
        "kl_causal_488_16chn": _row(35.04, 0.942, 0.047, 78.9),
        "kl_causal_41616_4chn": _row(25.05, 0.711, 0.228, 549.1),
        "kl_causal_288_8chn": _row(33.86, 0.928, 0.057, 80.7),
        "kl_causal_444_4chn": _row(34.78, 0.941, 0.051, 87.2),
        "kl_noncausal_488_4chn": _row(30.60, 0.876, 0.098, 157.9),
        "kl_noncausal_41616_4chn": _row(26.06, 0.751, 0.190, 423.2),
        "fsq_causal_488_262144": _row(29.82, 0.867, 0.106, 160.1),
        "fsq_causal_488_32768": _row(29.16, 0.854, 0.117, 196.9),
        "fsq_causal_488_4096": _row(28.36, 0.832, 0.133, 218.1),
        "fsq_causal_41616_262144": _row(25.38, 0.738, 0.206, 430.1),
        "fsq_noncausal_488_262144": _row(30.78, 0.889, 0.091, 132.1),
        "fsq_noncausal_41616_262144": _row(26.37, 0.772, 0.171, 357.0),
        "vidtwin_structure_7_7_4_dynamics_7_8": _row(28.137, 0.8044, 0.2414, 388.86),
    },
    "WebVid-Val": {
        "fsq_causal_488_32768": _row(31.04, 0.883, 0.089, 45.34),
        "fsq_causal_488_262144": _row(31.76, 0.896, 0.080, 38.17),
        "kl_causal_488_4chn": _row(31.53, 0.878, 0.087, 36.88),
        "kl_causal_488_16chn": _row(37.53, 0.961, 0.032, 9.12),
    },
}
"""Figures by data set and preset. VidTwin's are of the model that its paper calls the main one."""
