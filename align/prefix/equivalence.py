"""A real batch in; whether the shared and the unshared path agree on it, and if not why, out.

Shared-prefix attention is exact maths, but only for models whose layers do what it assumes. Nothing here trusts a list
of architectures: the first batch of a run is computed both ways, and the unshared path is used where they differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.errors import is_out_of_memory
from align.prefix.attention import PrefixUnsupported, use_shared_prefix
from align.prefix.layout import Layout
from align.prefix.log_probs import forward_segments, unshared_segments


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed difference of a token's log-probability, and of their mean, in nats."""

    largest: float
    mean: float


# In half precision single unlikely tokens differ between any two orders of summation. Measured in bfloat16 on random
# models of 4 and 12 layers: mean 0.002 to 0.011, largest 0.17, while rounding itself (against float32) is 0.018 to 0.036
# on average. Larger models add more of it, which the limits leave room for; what they catch are wrong masks and images.
TOLERANCES = {
    torch.float32: Tolerance(1e-4, 1e-4),
    torch.float64: Tolerance(1e-4, 1e-4),
    torch.bfloat16: Tolerance(1.0, 0.05),
    torch.float16: Tolerance(0.2, 0.01),
}


@dataclass(frozen=True)
class Equivalence:
    """`exact`: the paths agree. Errors are differences of per-token log-probabilities (nan if nothing was compared)."""

    exact: bool
    max_error: float
    tolerance: float
    reason: str
    mean_error: float = float("nan")


def tolerance_for(model: PreTrainedModel) -> Tolerance:
    """What may differ between two orders of summation in the model's dtype."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    if parameter.is_cuda and parameter.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        # Products of TensorFloat-32 (dpo.tf32) have as many digits as those of float16.
        return TOLERANCES[torch.float16]
    return TOLERANCES.get(parameter.dtype, TOLERANCES[torch.bfloat16])


def compare(shared: Tensor, unshared: Tensor, tolerance: Tolerance) -> Equivalence:
    """Log-probabilities of the same tokens by both ways, `(N,)` each. Not-a-number anywhere is disagreement."""
    errors = (shared.double() - unshared.double()).abs()
    if not errors.numel():
        return Equivalence(False, float("nan"), tolerance.largest, "there was no token to compare")
    largest, mean = float(errors.max()), float(errors.mean())
    exact = largest <= tolerance.largest and mean <= tolerance.mean
    reason = (
        f"shared and unshared log-probabilities {'agree' if exact else 'differ'} on {errors.numel()} tokens: "
        f"largest difference {largest:.2e} (allowed {tolerance.largest:g}), mean {mean:.2e} (allowed {tolerance.mean:g})"
    )
    return Equivalence(exact, largest, tolerance.largest, reason, mean)


def failed(error: Exception, tolerance: Tolerance) -> Equivalence:
    """The outcome for a path that raised."""
    reason = str(error) if isinstance(error, PrefixUnsupported) else f"{type(error).__name__}: {error}"
    return Equivalence(False, float("nan"), tolerance.largest, reason)


@torch.no_grad()
def check_equivalence(model: PreTrainedModel, prompt_inputs: Mapping[str, Any], layout: Layout) -> Equivalence:
    """Compare both paths on one batch; dropout is off meanwhile.

    Never raises for what a model cannot do: whatever exception its architecture raises becomes the reason.
    Running out of memory is raised, as it says nothing about the architecture.
    """
    tolerance = tolerance_for(model)
    was_training = model.training
    model.eval()
    try:
        use_shared_prefix(model)
        shared = forward_segments(model, prompt_inputs, layout).log_probs
        unshared = unshared_segments(model, prompt_inputs, layout).log_probs
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return failed(error, tolerance)
    finally:
        model.train(was_training)
    real = layout.is_token.to(shared.device)
    return compare(shared[real], unshared[real], tolerance)
