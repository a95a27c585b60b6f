"""Make reference.npz: a small part of a larger set of reference values, copied unchanged.

    python tests/models/vidtok/golden/remake.py FOLDER_OF_THE_LARGER_SET

The larger set was computed with the original VidTok implementation (microsoft/VidTok at d6ad92d) in float32 on the
CPU, with `models.weights.seeded_weights(config, 0)` as weights and the clips of `video` in
`tests/models/vidtok/test_golden.py` as inputs. KL was decoded from the mean. For each configuration and case there are
the encoder's output before the head (``enc``), the decoded clip (``dec``), and for FSQ the tokens (``indices``) and
four times the codes (``codes``).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

KEPT = {
    "fsq_causal_488_262144": "BG",
    "kl_causal_488_4chn": "G",
    "fsq_causal_888_32768_v1_1": "F",
    "kl_noncausal_488_4chn": "H",
}


def main(folder: Path) -> None:
    arrays: dict[str, Any] = {}
    for config, cases in KEPT.items():
        with np.load(folder / f"vidtok_{config}.npz") as whole:
            for key in whole.files:
                if key[0] in cases and key[1:2] == "/" and key[2:] in ("enc", "dec", "indices", "codes"):
                    arrays[f"{config}/{key}"] = whole[key]
    np.savez_compressed(Path(__file__).with_name("reference.npz"), **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
