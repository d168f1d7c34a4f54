"""The first loss of a training in; whether policy and reference really start as one out.

At its start the policy is the reference, so every loss must be what it is at equal log-probabilities: ln 2 for the
sigmoid loss (Rafailov et al., arXiv 2305.18290, eq. 7), and for any other one what TRL's own code gives there. Where it
is not, the reference is another model than the one that is trained, and so would be every gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from trl import DPOConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Relative to the loss, or absolute below 1. In half precision sums over a response's tokens differ by their rounding
# where batches are padded differently.
TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2


@dataclass
class RecordedForward:
    """A model that keeps what its last forward gave."""

    model: PreTrainedModel
    output: Any = field(default=None)

    def __call__(self, **inputs: Any) -> Any:
        self.output = self.model(**inputs)
        return self.output


def response_sums(log_probs: Tensor, completion_mask: Tensor, ld_alpha: float | None) -> tuple[Tensor, Tensor]:
    """(n,) summed log-probabilities of chosen and rejected responses, as TRL sums them.

    `log_probs` (2n, L - 1), `completion_mask` (2n, L). With `ld_alpha`, tokens beyond the shorter response of a pair
    count that much (LD-DPO, arXiv 2409.06411).

    >>> mask = torch.tensor([[0, 1, 1], [0, 1, 0]])
    >>> values = torch.tensor([[-1.0, -2.0], [-4.0, 0.0]])
    >>> [sums.tolist() for sums in response_sums(values, mask, None)]
    [[-3.0], [-4.0]]
    >>> [sums.tolist() for sums in response_sums(values, mask, 0.5)]
    [[-2.0], [-4.0]]
    """
    mask = completion_mask[:, 1:]
    log_probs = log_probs[:, -mask.shape[1] :] * mask
    if ld_alpha is not None:
        shared = torch.minimum(*mask.sum(dim=1).chunk(2)).repeat(2)
        log_probs = torch.where(mask.cumsum(dim=1) > shared[:, None], ld_alpha * log_probs, log_probs)
    chosen, rejected = log_probs.sum(dim=1).chunk(2)
    return chosen, rejected


def difference(loss: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two scalars differ by more than the tolerance, relative above 1 and absolute below.

    >>> difference(torch.tensor(0.790), torch.tensor(0.693), TOLERANCE)
    True
    """
    return bool((loss - expected).abs() > tolerance * expected.abs().clamp(min=1))


def tolerance_of(model: nn.Module, args: DPOConfig) -> float:
    """What the first loss may differ by, for the arithmetic that the forward runs in."""
    half = args.bf16 or args.fp16 or args.tf32
    weights = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return HALF_TOLERANCE if half or weights - {torch.float32, torch.float64} else TOLERANCE


def noise_in(model: nn.Module, args: DPOConfig) -> str | None:
    """What makes two forwards of the same weights differ while training, or None."""
    if args.neftune_noise_alpha:
        return "neftune_noise_alpha"
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"dropout in {name}"
        for attribute, value in vars(module).items():
            if "drop" in attribute and isinstance(value, float) and value > 0:
                return f"{attribute} in {name or 'the model'}"
    return None
