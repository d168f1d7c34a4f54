"""The benchmarks' inputs are what they say: prompts of the asked length whose images fit their placeholders."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from align.config import ModelSettings
from align.engines.base import SamplingSettings
from align.engines.open import open_engine

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_common
import bench_engines
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


def test_the_engines_benchmark_writes_its_model_and_measures_both_sides_on_the_same_questions(tmp_path: Path):
    """Another local engine in vLLM's place; tests/vllm has the real one."""
    bench_engines.make_folder("tiny", tmp_path / "tiny", "cpu", torch.float32)
    engine = open_engine(str(tmp_path / "tiny"), ModelSettings(device="cpu"), open_image=lambda image: image)
    shape = bench_engines.Shape(side=40, num_samples=2, questions=2)
    row = bench_engines.measure(engine, engine, shape, SamplingSettings(temperature=1.0, max_new_tokens=2), repeats=1)
    assert row.prompt_tokens > 100
    for side in (row.local, row.vllm):
        assert len(side.questions_per_s) == len(side.tokens_per_s) == 1
        assert 2 <= side.tokens_per_s[0] / side.questions_per_s[0] <= 4
    line = bench_engines.table([row]).splitlines()[-1]
    assert line.startswith(f"| {row.prompt_tokens} | 2 | 2 | ")
    first, again, later = (bench_engines.questions(shape, repeat)[1].images[0].tobytes() for repeat in (0, 0, 1))
    assert first == again
    assert first != later


def test_the_engines_benchmark_reads_the_flags_of_a_gpu():
    words = ["--size", "valley-eagle-7b", "--device", "cuda", "--vllm", "kv-cache-dtype=fp8", "--quick"]
    options = bench_engines.read_arguments(words)
    assert (options.size, options.device, options.vllm) == ("valley-eagle-7b", "cuda", ["kv-cache-dtype=fp8"])
    assert len({(shape.side, shape.num_samples, shape.questions) for shape in bench_engines.every_shape()}) == 7
