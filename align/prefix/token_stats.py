"""Hidden states and a vocabulary projection in; log-probabilities and other statistics of given tokens out.

No tensor of `(tokens, vocabulary)` outlives a chunk: logits are computed again in backward. What TRL's fused head
returns is returned here under the same names and with the same gradients, in plain torch on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
# Rows of logits that exist at one time: 512 x 152,000 x 4 bytes is 0.3 GiB.
CHUNK_SIZE = 512


@dataclass
class TokenStats:
    """Per token, all of one shape: fp32, but `is_top1` bool. What was not asked for is None.

    `log_probs`: of the token. `entropy`: of its distribution, in nats. `mean_logits`: over the vocabulary.
    `is_top1`: whether the token is the likeliest. `log_sum_sq_probs`: log of the sum of squared probabilities.
    The first two carry gradients, the others do not, as in TRL's fused head.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None

    def select(self, mask: Tensor) -> TokenStats:
        """The values where `mask` is True, one after the other."""
        picked: dict[str, Any] = {}
        for name in OUTPUTS:
            value = getattr(self, name)
            picked[name] = None if value is None else value[mask]
        return TokenStats(**picked)

    def scatter(self, mask: Tensor) -> TokenStats:
        """From one value per True of `mask` to the shape of `mask`, with zero (False) elsewhere."""
        spread: dict[str, Any] = {}
        for name in OUTPUTS:
            value = getattr(self, name)
            spread[name] = None if value is None else value.new_zeros(mask.shape).masked_scatter(mask, value)
        return TokenStats(**spread)


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    outputs: Sequence[str] = ("log_probs",),
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    chunk_size: int = CHUNK_SIZE,
) -> TokenStats:
    """Statistics `(N,)` of `targets` `(N,)` int64 under `hidden @ weight.T + bias`, `(N, H)` and `(V, H)`.

    What a softcap leaves is divided by `temperature`, as when sampling.

    Logits exist for `chunk_size` tokens at a time and are computed again in backward. The projection runs in the
    dtype of `hidden` (autocast's where it is on), the softmax in fp32. Gradients reach `hidden`, `weight` and `bias`.
    """
    unknown = set(outputs) - set(OUTPUTS)
    assert not unknown, f"unknown outputs {unknown}"
    values = _TokenStats.apply(
        hidden, weight, bias, targets, tuple(outputs), softcap, logit_scale, temperature, chunk_size
    )
    return TokenStats(*values)


class _TokenStats(torch.autograd.Function):
    """With p the softmax of the final logits z and H its entropy: d log p_t / dz = onehot(t) - p, and
    dH / dz = -p * (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        outputs: tuple[str, ...],
        softcap: float | None,
        logit_scale: float,
        temperature: float,
        chunk_size: int,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        device_type = hidden.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
        values: dict[str, list[Tensor]] = {name: [] for name in OUTPUTS}
        with _gathered(weight, bias):
            projection = weight.to(dtype)
            for chunk, target in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
                logits, _ = final_logits(chunk.to(dtype), projection, bias, softcap, logit_scale, temperature)
                for name, value in _statistics(logits, target, outputs).items():
                    values[name].append(value)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.dtype, ctx.chunk_size = dtype, chunk_size
        ctx.of_logits = softcap, logit_scale, temperature
        results = [
            (torch.cat(values[name]) if values[name] else None) if name in outputs or name == "log_probs" else None
            for name in OUTPUTS
        ]
        ctx.mark_non_differentiable(*(value for value in results[2:] if value is not None))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> Any:
        hidden, weight, bias, targets = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grads_hidden, grad_weight, grad_bias = [], None, None
        with _gathered(weight, bias):
            projection = weight.to(ctx.dtype)
            for start in range(0, max(len(hidden), 1), ctx.chunk_size):
                at = slice(start, start + ctx.chunk_size)
                chunk = hidden[at].to(ctx.dtype)
                logits, slope = final_logits(chunk, projection, bias, *ctx.of_logits)
                grad = _grad_logits(
                    logits,
                    targets[at],
                    None if grad_log_probs is None else grad_log_probs[at],
                    None if grad_entropy is None else grad_entropy[at],
                )
                grad = (grad if slope is None else grad * slope).to(ctx.dtype)
                if needs_hidden:
                    grads_hidden.append((grad @ projection).to(hidden.dtype))
                if needs_weight:
                    # Summed over chunks in fp32: bf16 would lose small contributions.
                    part = (grad.t() @ chunk).float() if len(hidden) > ctx.chunk_size else grad.t() @ chunk
                    grad_weight = part if grad_weight is None else grad_weight.add_(part)
                if needs_bias:
                    part = grad.sum(dim=0, dtype=torch.float32)
                    grad_bias = part if grad_bias is None else grad_bias.add_(part)
        return (
            torch.cat(grads_hidden) if grads_hidden else None,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *[None] * 6,
        )


def _gathered(weight: Tensor, bias: Tensor | None) -> AbstractContextManager[Any]:
    """Under ZeRO-3 the parameters are there only while gathered; elsewhere nothing is to be done."""
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # One that is there already (small, or tied to embeddings in use) must not be taken away again at the end.
    absent = [p for p in (weight, bias) if p is not None and p.ds_status != ZeroParamStatus.AVAILABLE]  # type: ignore[attr-defined]
    return deepspeed.zero.GatheredParameters(absent) if absent else nullcontext()


def final_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor | float | None]:
    """fp32 logits as the model means them, over the temperature,
    and their derivative by the projection's output (None: 1)."""
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    logits = logits.float()
    slope: Tensor | float | None = None
    if logit_scale != 1.0:
        logits, slope = logits * logit_scale, logit_scale
    if softcap is not None:
        squashed = torch.tanh(logits / softcap)
        logits, slope = squashed * softcap, (1 - squashed.square()) * logit_scale
    if temperature != 1.0:
        logits, slope = logits / temperature, (1.0 if slope is None else slope) / temperature
    return logits, slope


def _statistics(logits: Tensor, targets: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
    log_z = logits.logsumexp(dim=-1)
    values = {"log_probs": logits.gather(1, targets[:, None])[:, 0] - log_z}
    if "mean_logits" in outputs:
        values["mean_logits"] = logits.mean(dim=-1)
    if "is_top1" in outputs:
        values["is_top1"] = logits.argmax(dim=-1) == targets
    if "entropy" in outputs or "log_sum_sq_probs" in outputs:
        log_p = logits - log_z[:, None]
        if "entropy" in outputs:
            values["entropy"] = -(log_p.exp() * log_p).sum(dim=-1)
        if "log_sum_sq_probs" in outputs:
            values["log_sum_sq_probs"] = (2 * log_p).logsumexp(dim=-1)
    return values


def _grad_logits(logits: Tensor, targets: Tensor, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
    log_p = logits - logits.logsumexp(dim=-1, keepdim=True)
    p = log_p.exp()
    grad = torch.zeros_like(p)
    if grad_log_probs is not None:
        grad -= p * grad_log_probs[:, None]
        grad.scatter_add_(1, targets[:, None], grad_log_probs[:, None].float())
    if grad_entropy is not None:
        entropy = -(p * log_p).sum(dim=-1, keepdim=True)
        grad -= p * (log_p + entropy) * grad_entropy[:, None]
    return grad
