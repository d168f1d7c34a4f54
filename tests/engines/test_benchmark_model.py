"""The benchmarks' inputs are what they say: prompts of the asked length whose images fit their placeholders."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_common
import bench_score

TINY = bench_common.Size(width=32, num_layers=1, num_heads=2, num_key_value_heads=1)


@pytest.mark.parametrize("length", [200, 400, 1000])
def test_prompts_have_the_asked_length_and_are_mostly_image(length: int):
    model = bench_common.build_model(TINY)
    inputs = bench_common.prompt_inputs(model, length)
    assert inputs["input_ids"].shape == (1, length)
    share = (inputs["input_ids"] == bench_common.IMAGE_TOKEN).float().mean()
    assert 0.5 < share <= 0.88
    with torch.no_grad():
        assert model(**inputs, logits_to_keep=1).logits.isfinite().all()


def test_both_sides_of_the_scoring_benchmark_read_the_same_comparisons():
    model = bench_common.build_model(TINY)
    result = bench_score.compare(model, 200, 6, 3, repeats=1, with_memory=True)
    assert result.label["comparisons"] == 6
    assert result.ratio > 0
    assert result.ours_mib is not None
    assert result.ours_mib > 0


def test_the_ratio_is_the_median_of_repeats_in_turn():
    result = bench_common.Comparison({"K": 1}, ours_s=[1.0, 2.0, 1.0], theirs_s=[3.0, 4.0, 10.0])
    assert result.ratios == [3.0, 2.0, 10.0]
    assert result.ratio == 3.0
    assert "| 1 | 1.000 | 4.000 | 3.00 | 2.00-10.00 |" in bench_common.table([result])


def test_growth_finds_what_is_paid_for_every_branch():
    def seconds(p: float, k: int, each: bool) -> float:
        return 0.5 + 2.0 * p + 0.1 * k + (3.0 * p * k if each else 0.0)

    shapes = [(200, 5), (1000, 5), (4000, 5), (1000, 1), (1000, 20), (200, 20)]
    found = bench_common.growth(
        [
            bench_common.Comparison(
                {"prompt": p, "K": k}, ours_s=[seconds(p / 1000, k, False)], theirs_s=[seconds(p / 1000, k, True)]
            )
            for p, k in shapes
        ],
        "K",
    )
    assert found["ours"]["per both"] == pytest.approx(0.0, abs=1e-6)
    assert found["theirs"]["per both"] == pytest.approx(3.0)
    assert found["ours"]["per 1000 prompt tokens"] == pytest.approx(2.0)
