"""The chunked vocabulary projection against logits written out in full."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from align.prefix.token_stats import OUTPUTS, TokenStats, token_stats


def case(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 5, dtype=dtype, requires_grad=True)
    offset = torch.randn(11, dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, offset, torch.randint(0, 11, (7,))


def written_out(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    scale: float,
    temperature: float,
) -> TokenStats:
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    p = logits.softmax(dim=-1)
    return TokenStats(
        log_probs=p[torch.arange(len(p)), targets].log(),
        entropy=-(p * p.log()).sum(dim=-1),
        mean_logits=logits.sum(dim=-1) / logits.shape[-1],
        is_top1=p.max(dim=-1).indices == targets,
        log_sum_sq_probs=p.square().sum(dim=-1).log(),
    )


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize(
    ("softcap", "scale", "temperature"),
    [(None, 1.0, 1.0), (2.0, 1.0, 1.0), (None, 0.5, 1.0), (3.0, 0.5, 1.0), (None, 1.0, 0.7), (3.0, 0.5, 0.7)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_equal_those_of_full_logits(
    chunk_size: int, softcap: float | None, scale: float, temperature: float, bias: bool
):
    hidden, weight, offset, targets = case(torch.float32, bias)
    parameters = [p for p in (hidden, weight, offset) if p is not None]
    theirs = written_out(hidden, weight, offset, targets, softcap, scale, temperature)
    ours = token_stats(
        hidden,
        weight,
        offset,
        targets,
        outputs=OUTPUTS,
        softcap=softcap,
        logit_scale=scale,
        temperature=temperature,
        chunk_size=chunk_size,
    )
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-5, rtol=1e-5)
    weights = torch.linspace(-1, 2, 7)

    def loss(stats: TokenStats) -> Tensor:
        assert stats.entropy is not None
        return (weights * stats.log_probs).sum() + (weights.flip(0) * stats.entropy).sum()

    expected = torch.autograd.grad(loss(theirs), parameters)
    found = torch.autograd.grad(loss(ours), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_only_what_was_asked_for_is_computed():
    stats = token_stats(*case(), outputs=("log_probs", "is_top1"))
    assert stats.entropy is None
    assert stats.mean_logits is None
    assert stats.is_top1 is not None
    assert not stats.is_top1.requires_grad


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, _, targets = case()
    stats = token_stats(hidden, weight.detach(), None, targets)
    stats.log_probs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_autocast_projects_in_its_dtype_and_returns_fp32():
    hidden, weight, _, targets = case(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = token_stats(hidden, weight, None, targets)
    assert stats.log_probs.dtype == torch.float32
    expected = token_stats(hidden.bfloat16(), weight.bfloat16(), None, targets)
    assert torch.equal(stats.log_probs, expected.log_probs)
    stats.log_probs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_scatter_puts_values_where_the_mask_is_true():
    mask = torch.tensor([[True, False], [False, True]])
    stats = TokenStats(log_probs=torch.tensor([1.0, 2.0]), is_top1=torch.tensor([True, True])).scatter(mask)
    assert stats.log_probs.tolist() == [[1.0, 0.0], [0.0, 2.0]]
    assert stats.is_top1 is not None
    assert stats.is_top1.tolist() == [[True, False], [False, True]]
    assert stats.entropy is None


def test_no_token_gives_an_empty_result_that_can_still_be_differentiated():
    hidden, weight, bias, targets = case()
    stats = token_stats(hidden[:0], weight, bias, targets[:0])
    assert stats.log_probs.shape == (0,)
    stats.log_probs.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
