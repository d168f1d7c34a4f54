"""A real batch in; whether the shared and the unshared path agree on it, and if not why, out.

Shared-prefix attention is exact maths, but only for models whose layers do what it assumes. Nothing here trusts a list
of architectures: the first batch of a run is computed both ways, and the unshared path is used where they differ.

How far two right computations lie apart is measured, not assumed: the unshared path against itself with padding on the
left and with the result of every linear layer rounded the other way here and there (the noise). The shared path must
lie within a few times of that. And the
check must be able to fail: rows that are laid out wrong on purpose, one position too far or with a response that sees
its sibling, must lie outside. In half precision on long prompts they need not; then the same rows are compared in
float32. Where that does not tell right from wrong either, the answer is no.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.errors import is_out_of_memory
from align.prefix.attention import PrefixUnsupported, use_shared_prefix
from align.prefix.encode_once import images_encoded_once
from align.prefix.full_precision import HALF, can_compute_in_float32, computes_in, in_float32
from align.prefix.layout import Layout
from align.prefix.log_probs import forward_segments, unshared_segments
from align.prefix.rows import unwrap

# How many times the noise is allowed. Measured on seven families and on models of 4 and 12 layers, in float32 and
# bfloat16: right rows lie at 0 to 1.1 times the mean and at 0 to 2 times the largest difference.
MEAN_ALLOWED, LARGEST_ALLOWED = 3.0, 6.0
# A logit of usual size, whose last place is that of 8 to 16.
LOGIT = 8.0
# Tokens to the left of the rows whose noise is measured: odd, so that no tile stays where it was.
PADDING = 7


@dataclass(frozen=True)
class Difference:
    """Between two sets of log-probabilities of the same tokens, in nats: the largest and the mean;
    nan if one has nan."""

    largest: float
    mean: float

    @classmethod
    def between(cls, one: Tensor, other: Tensor) -> Difference:
        """Of two tensors of equal shape."""
        errors = (one.double() - other.double()).abs()
        return cls(float(errors.max()), float(errors.mean()))

    def within(self, limit: Difference) -> bool:
        """Not-a-number is not within anything."""
        return self.largest <= limit.largest and self.mean <= limit.mean

    def __str__(self) -> str:
        return f"largest {self.largest:.1e}, mean {self.mean:.1e}"


@dataclass(frozen=True)
class Equivalence:
    """`exact`: the paths agree, and the check could have said otherwise. `reason` says what was measured.

    `difference` and `allowed` are None where nothing was compared; `wrong` has the difference of rows laid out wrong.
    """

    exact: bool
    reason: str
    difference: Difference | None = None
    allowed: Difference | None = None
    wrong: Mapping[str, Difference] | None = None

    @property
    def cannot_tell(self) -> bool:
        """The paths agree, but so do rows that are laid out wrong."""
        return not self.exact and None not in (self.difference, self.allowed) and self.difference.within(self.allowed)  # type: ignore[union-attr,arg-type]


def failed(error: Exception) -> Equivalence:
    """The outcome for a path that raised."""
    return Equivalence(
        False, str(error) if isinstance(error, PrefixUnsupported) else f"{type(error).__name__}: {error}"
    )


@torch.no_grad()
def check_equivalence(
    model: PreTrainedModel, prompt_inputs: Mapping[str, Any], layout: Layout, shared: Tensor | None = None
) -> Equivalence:
    """Compare both paths on one batch, in the arithmetic that is on (autocast); dropout is off meanwhile.

    `shared` `(B, S)`: log-probabilities of the layout's tokens that another shared computation has found (decoding).

    Never raises for what a model cannot do: whatever exception its architecture raises becomes the reason.
    Running out of memory is raised, as it says nothing about the architecture.
    """
    if not layout.is_token.any():
        return Equivalence(False, "there was no token to compare")
    was_training = model.training
    model.eval()
    try:
        use_shared_prefix(model)
        found = _compare(model, prompt_inputs, layout, shared)
        if found.cannot_tell and computes_in(model) in HALF and can_compute_in_float32(model):
            with in_float32(model):
                return _in_float32(found, _compare(model, prompt_inputs, layout, None))
        return found
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return failed(error)
    finally:
        model.train(was_training)


def _compare(
    model: PreTrainedModel, prompt_inputs: Mapping[str, Any], layout: Layout, shared: Tensor | None
) -> Equivalence:
    def shared_path(rows: Layout) -> Tensor:
        return forward_segments(model, prompt_inputs, rows).log_probs[real].cpu()

    def unshared_path(left_padding: int = 0) -> Tensor:
        return unshared_segments(model, prompt_inputs, layout, left_padding=left_padding).log_probs[real].cpu()

    real = layout.is_token
    with images_encoded_once(model):
        ours = shared_path(layout) if shared is None else shared[real.cpu()].cpu()
        unshared = unshared_path()
        with rounded_otherwise(model):
            noise = Difference.between(unshared_path(PADDING), unshared)
        wrong = {name: Difference.between(shared_path(rows), unshared) for name, rows in wrong_layouts(layout).items()}
    allowed = _allowed(noise, unshared)
    difference = Difference.between(ours, unshared)
    passing = [name for name, found in wrong.items() if found.within(allowed)]
    agree = difference.within(allowed)
    measured = f"on {len(ours)} tokens ({difference}; allowed, from the noise of the unshared path: {allowed})"
    if agree and passing:
        reason = f"the check cannot tell: rows with {' and with '.join(passing)} pass as well {measured}"
    else:
        reason = f"shared and unshared log-probabilities {'agree' if agree else 'differ'} {measured}"
    return Equivalence(agree and not passing, reason, difference, allowed, wrong)


def _allowed(noise: Difference, log_probs: Tensor) -> Difference:
    """A few times the noise, which is no less than the last place of what is float32: the log-probabilities, and the
    logits that they are differences of. A confident model has log-probabilities near 0 from logits that are not."""
    unit = torch.finfo(torch.float32).eps
    return Difference(
        LARGEST_ALLOWED * max(noise.largest, unit * max(LOGIT, float(log_probs.abs().max()))),
        MEAN_ALLOWED * max(noise.mean, unit / 2 * max(LOGIT, float(log_probs.abs().mean()))),
    )


@contextmanager
def rounded_otherwise(model: nn.Module) -> Iterator[None]:
    """Within the context the results of the language model's linear layers are moved by up to half a unit in the last
    place, at random: what another order of summation may do."""
    generators: dict[torch.device, torch.Generator] = {}

    def move(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        generator = generators.setdefault(output.device, torch.Generator(output.device).manual_seed(0))
        moves = torch.randint(-1, 2, output.shape, generator=generator, device=output.device)
        wide = torch.promote_types(output.dtype, torch.float32)
        return (output.to(wide) * (1 + torch.finfo(output.dtype).eps / 2 * moves)).to(output.dtype)

    linear = [module for module in unwrap(model).get_decoder().modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_hook(move) for module in linear]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def wrong_layouts(layout: Layout) -> dict[str, Layout]:
    """The same rows laid out wrong, by what is wrong with them."""
    found = {"positions shifted by one": replace(layout, path_position=layout.path_position + 1)}
    related = layout.ancestors | layout.ancestors.transpose(1, 2)
    counts = layout.segment.new_zeros(layout.ancestors.shape[:2])
    present = counts.scatter_add(1, layout.segment.clamp(min=0), layout.is_token.long()) > 0
    if (present[:, :, None] & present[:, None, :] & ~related).any():
        found["siblings that see one another"] = replace(layout, ancestors=torch.ones_like(layout.ancestors))
    return found


def _in_float32(half: Equivalence, full: Equivalence) -> Equivalence:
    """What both comparisons say together, the first of which agrees and cannot tell."""
    reason = f"{full.reason} in float32, where right and wrong can be distinguished; as computed {half.difference}"
    return replace(full, reason=reason if full.exact else full.reason + " in float32")
