r"""Log-probabilities of chosen responses under the real and under a corrupted picture in, terms beside TRL's loss out.

mDPO (Wang et al., arXiv 2406.11839) finds that DPO of pairs about pictures learns from the texts alone, and adds two
terms. With m the picture, k the corrupted one, x the question, y the chosen response, policy p and reference q, and the
rewards

    r(m) = beta (log p(y | m, x) - log q(y | m, x))        r(k) = beta (log p(y | k, x) - log q(y | k, x))

they are, for each pair (equations 4 and 5):

    conditional   -log sigmoid(r(m) - r(k))     the response should owe more to the picture than to what is left of it
    anchor        -log sigmoid(r(m) - delta)    its reward should not sink, as it may where only differences count

The loss of a micro-batch is TRL's plus `weight` times the mean of the first plus `anchor` times the mean of the second,
over all pairs; a pair without a picture adds 0. An objective of the kind is a function of `OBJECTIVES`.

With r(m) = 1, r(k) = 0 and delta 0 both terms are -log sigmoid(1) = log(1 + 1/e) = 0.3133:

>>> from align.config import ImagePreference
>>> rewards = PictureRewards(torch.tensor([1.0]), torch.tensor([0.0]))
>>> [round(float(term(rewards, ImagePreference())[0]), 4) for term in OBJECTIVES.values()]
[0.3133, 0.3133]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.config import ImagePreference


@dataclass(frozen=True)
class PictureRewards:
    """Rewards (n,) of chosen responses: under the real picture, and under the corrupted one."""

    real: Tensor
    corrupted: Tensor

    @classmethod
    def of(
        cls, beta: float, real: Tensor, ref_real: Tensor, corrupted: Tensor, ref_corrupted: Tensor
    ) -> PictureRewards:
        """From log-probabilities (n,), summed over the tokens, of policy and reference."""
        return cls(beta * (real - ref_real), beta * (corrupted - ref_corrupted))


def conditional(rewards: PictureRewards, settings: ImagePreference) -> Tensor:
    """(n,): the chosen response under the real picture against the same under the corrupted one (mDPO, eq. 4)."""
    return -logsigmoid(rewards.real - rewards.corrupted)


def anchor(rewards: PictureRewards, settings: ImagePreference) -> Tensor:
    """(n,): the reward of the chosen response against `delta` (mDPO, eq. 5)."""
    return -logsigmoid(rewards.real - settings.delta)


# By name, which is that of their metrics; each gives a term for every pair.
OBJECTIVES: dict[str, Callable[[PictureRewards, ImagePreference], Tensor]] = {
    "conditional": conditional,
    "anchor": anchor,
}


def weights_of(settings: ImagePreference) -> dict[str, float]:
    """What each objective counts beside TRL's loss."""
    return {"conditional": settings.weight, "anchor": settings.anchor}


def picture_loss(
    rewards: PictureRewards, has_picture: Tensor, settings: ImagePreference
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar that is added to the loss, and metrics (n,): NaN without a picture (`has_picture` (n,) bool).

    `image/margins`: r(m) - r(k); `image/accuracies`: whether it is above 0; `image/conditional`, `image/anchor`: the
    terms before their weights.
    """
    nothing = torch.full_like(rewards.real, float("nan")).detach()
    margins = (rewards.real - rewards.corrupted).detach()
    metrics = {"margins": margins, "accuracies": (margins > 0).float()}
    loss = rewards.real.new_zeros(())
    for name, weight in weights_of(settings).items():
        term = OBJECTIVES[name](rewards, settings)
        loss = loss + weight * torch.where(has_picture, term, 0.0).mean()
        metrics[name] = term.detach()
    return loss, {f"image/{name}": torch.where(has_picture, value, nothing) for name, value in metrics.items()}
