"""Networks that `benchmarks.ladder` compares."""

from __future__ import annotations

import pytest

from benchmarks.ladder import table_row
from benchmarks.ladder_networks import VARIANTS, build, check


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_is_causal_on_the_same_grid_at_the_same_cost(name: str) -> None:
    check(VARIANTS[name])


def test_shortcuts_have_no_weights() -> None:
    for name in ("baseline", "haar"):
        plain = build(VARIANTS[name], 0).state_dict()
        other = build(VARIANTS["shortcuts" if name == "baseline" else f"{name}+shortcuts"], 0).state_dict()
        assert {name: weight.shape for name, weight in plain.items()} == {
            n: weight.shape for n, weight in other.items()
        }


def test_a_variant_is_compared_with_the_baseline_of_the_same_seeds() -> None:
    def row(variant: str, seed: int, psnr: float) -> dict[str, str | int | float]:
        figures = {"halfway": 1.0, "PSNR dB": psnr, "generated": psnr, "entropy bits": 14.0, "core s / step": 0.3}
        return {"variant": variant, "seed": seed, **figures}

    rows = [row("baseline", 0, 20.0), row("haar", 0, 20.5), row("baseline", 1, 23.0), row("shortcuts", 2, 21.0)]
    assert table_row("haar", rows)["to baseline"] == "+0.50"
    assert table_row("shortcuts", rows)["to baseline"] == "-"
    baseline = table_row("baseline", rows)
    assert [baseline[name] for name in ("seeds", "PSNR dB", "from", "to", "bits")] == [2, 21.5, 20.0, 23.0, 18.0]
