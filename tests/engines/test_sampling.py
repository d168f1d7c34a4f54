"""Choosing tokens: against transformers' own warpers, and against distributions written out in full."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from align.engines.base import SamplingSettings
from align.engines.sampling import NUCLEUS_GUESS, choose, penalise_repetition, uniforms


def settings(**changes: float) -> SamplingSettings:
    return SamplingSettings(**{"temperature": 1.0, "max_new_tokens": 1, **changes})  # type: ignore[arg-type]


def warped(logits: torch.Tensor, how: SamplingSettings) -> torch.Tensor:
    """The distribution that generate would draw from, by transformers' warpers in generate's order."""
    warpers = LogitsProcessorList()
    if how.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(how.temperature))
    if how.top_k:
        warpers.append(TopKLogitsWarper(how.top_k))
    if how.top_p < 1.0:
        warpers.append(TopPLogitsWarper(how.top_p))
    return warpers(torch.zeros(len(logits), 1, dtype=torch.int64), logits).softmax(dim=-1)


def shares(logits: torch.Tensor, how: SamplingSettings, num_points: int = 20_000) -> torch.Tensor:
    """How much of [0, 1) leads to each token: our distribution, by a fine grid of numbers."""
    grid = (torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points
    return torch.stack(
        [
            torch.bincount(choose(row.expand(num_points, -1), how, grid), minlength=logits.shape[1]) / num_points
            for row in logits
        ]
    )


@pytest.mark.parametrize(
    "how",
    [
        settings(),
        settings(temperature=0.7),
        settings(temperature=2.0, top_k=5),
        settings(top_p=0.6),
        settings(temperature=0.7, top_p=0.9),
        settings(temperature=1.5, top_k=6, top_p=0.8),
        settings(top_k=1),
        settings(top_p=1e-6),
    ],
)
def test_the_distribution_is_that_of_transformers_warpers(how: SamplingSettings):
    torch.manual_seed(0)
    logits = torch.randn(3, 12) * 2
    assert (shares(logits, how) - warped(logits, how)).abs().max() <= 1e-4


def test_a_nucleus_wider_than_the_first_guess_is_found_whole():
    torch.manual_seed(0)
    logits = torch.randn(1, NUCLEUS_GUESS + 300) * 0.1
    how = settings(top_p=0.95)
    expected = warped(logits, how)
    assert (expected > 0).sum(dim=1).min() > NUCLEUS_GUESS
    kept = shares(logits, how, num_points=8_000) > 0
    assert torch.equal(kept, expected > 0)


def test_temperature_zero_is_the_likeliest_token():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]])
    assert choose(logits, settings(temperature=0.0), None).tolist() == [1, 0]


def test_numbers_at_both_ends_choose_tokens_that_are_possible():
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(2, -1)
    ends = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    for how in (settings(), settings(top_p=0.99), settings(top_k=3)):
        assert set(choose(logits, how, ends).tolist()) <= {1, 2}
    assert choose(logits, settings(), ends).tolist() == [1, 2]


def test_the_penalty_for_repetition_is_that_of_transformers():
    torch.manual_seed(0)
    logits = torch.randn(2, 9)
    ids = torch.tensor([[1, 4, 4], [0, 8, 2]])
    seen = torch.zeros(2, 9, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    assert torch.allclose(penalise_repetition(logits, seen, 1.3), expected)


def test_a_samples_numbers_depend_on_its_seed_and_index_alone():
    together = uniforms([1, 2, 3], num_samples=4, num_steps=6)
    assert torch.equal(uniforms([3], num_samples=2, num_steps=3)[0], together[2, :2, :3])
    assert together.unique().numel() == together.numel()


def test_the_numbers_are_uniform():
    numbers = uniforms(range(50), num_samples=4, num_steps=50).flatten()
    counts = torch.histc(numbers, bins=20, min=0.0, max=1.0)
    expected = numbers.numel() / 20
    # Chi-square with 19 degrees of freedom: above 43.8 in one of a thousand.
    assert float(((counts - expected) ** 2 / expected).sum()) < 43.8
