"""A round's sampled held-out responses in, the KL divergence of its checkpoint from the first policy out.

With y drawn from the checkpoint, log p(y) - log p_first(y) is an unbiased estimate of KL(p || p_first) (k1 in Schulman,
"Approximating KL divergence", 2020, http://joschu.net/blog/kl-approx.html), provided that p is what y was drawn from.
So both policies are taken at the temperature of the evaluation: at another one the difference would be the estimate of
no divergence, and might well be negative. The tokens are those that were drawn, not the text cut into tokens anew.

Its low-variance relative k3 adds p_first(y)/p(y) - 1, which has mean zero but hardly ever shows it: where training has
taught the checkpoint to avoid a token that the first policy liked, the ratio is huge in draws that are never seen, and
what is seen lies far too low. k1 has light tails there. The exact divergence per token needs the whole distributions of
both models at once: two models in memory, or a vocabulary's worth of numbers per token on disk.

One model is in memory at a time (align.evaluation.log_probs); what is finished is kept, as in every stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from align.config import Config
from align.evaluation.log_probs import OneModel, weigh
from align.log import log
from align.media.images import ImageStore
from align.records import Evaluation, ResponseLogProbs
from align.run.folder import Round
from align.statistics import bootstrap_mean, bootstrap_ratio
from reward.intervals import Interval

# What servers say of the responses that they weighed.
WEIGHED = ("log-probabilities", "responses not weighed")


def is_measured(config: Config, number: int) -> bool:
    """Whether the KL of a round is estimated: not that of the first policy from itself."""
    return config.evaluate.kl and number > 0 and why_not_measured(config) is None


def why_not_measured(config: Config) -> str | None:
    """Why the KL that is wanted is not estimated on servers; None where it is, or is not wanted."""
    evaluate = config.evaluate
    if not evaluate.kl or not evaluate.servers:
        return None
    if not evaluate.first_policy_servers:
        return "left out: no server has the first policy (evaluate.first_policy_servers)"
    if evaluate.temperature > 1:
        return "left out: servers weigh no responses at a temperature above 1 (evaluate.temperature)"
    return None


def log_probs_of_both(
    config: Config, this: Round, checkpoint: str, lines: Sequence[Evaluation], models: OneModel, images: ImageStore
) -> dict[str, str]:
    """Weigh the sampled responses of `lines` under the checkpoint that gave them and under the first policy; notes."""
    from align.engines.base import GivenResponses

    given = [
        GivenResponses(
            id=line.id,
            messages=line.question.messages(),
            images=tuple(line.question.images),
            token_ids=tuple(tuple(response.token_ids) for response in line.sampled),
        )
        for line in lines
    ]
    temperature, label = config.evaluate.temperature, f"round {this.number}"
    own = weigh(
        this.own_log_probs,
        given,
        checkpoint,
        models,
        images=images,
        label=f"{label}: log-probabilities",
        temperature=temperature,
    )
    first = weigh(
        this.first_log_probs,
        given,
        config.policy,
        models,
        images=images,
        label=f"{label}: under the first policy",
        temperature=temperature,
    )
    weighed = {f"{name} of the checkpoint": text for name, text in own.notes.items() if name in WEIGHED}
    notes = weighed | {f"{name} of the first policy": text for name, text in first.notes.items()}
    return notes


def divergence(own: Sequence[ResponseLogProbs], first: Sequence[ResponseLogProbs]) -> dict[str, Interval]:
    """`kl` in nats per response and `kl_per_token`, with 95 % intervals over questions;
    nothing where no number is finite.

    Responses that one of the two finds impossible (a logarithm that is not finite) are left out, and so are questions
    that one of them was not asked, since an image could not be read any more.
    """
    nats = [_differences(*both) for both in _of_both(own, first)]
    kept = [[pair for pair in pairs if math.isfinite(pair[0])] for pairs in nats]
    left_out = sum(map(len, nats)) - sum(map(len, kept))
    if left_out:
        log.warning("KL: %d responses have no finite log-probability and are left out", left_out)
    if not any(kept):
        return {}
    found = {"kl": bootstrap_mean([[value for value, _ in pairs] for pairs in kept])}
    sums, sizes = ([float(sum(pair[i] for pair in pairs)) for pairs in kept] for i in (0, 1))
    return found | ({"kl_per_token": bootstrap_ratio(sums, sizes)} if any(sizes) else {})


def _of_both(
    own: Sequence[ResponseLogProbs], first: Sequence[ResponseLogProbs]
) -> list[tuple[ResponseLogProbs, ResponseLogProbs]]:
    """The lines of the questions that both were asked."""
    theirs = {line.id: line for line in first}
    return [(mine, theirs[mine.id]) for mine in own if mine.id in theirs]


def _differences(own: ResponseLogProbs, first: ResponseLogProbs) -> list[tuple[float, int]]:
    """Nats and tokens of every response to a question."""
    pairs = zip(own.log_probs, first.log_probs, own.num_tokens, strict=True)
    return [(mine - theirs, num_tokens) for mine, theirs, num_tokens in pairs]


def kl_of_questions(this: Round) -> dict[str, list[float]]:
    """Per held-out question the nats of its responses, as far as they lie on disk."""
    from align.records import read_jsonl

    if not (this.own_log_probs.is_file() and this.first_log_probs.is_file()):
        return {}
    own, first = (read_jsonl(path, ResponseLogProbs) for path in (this.own_log_probs, this.first_log_probs))
    return {
        mine.id: [nats for nats, _ in _differences(mine, theirs)]
        for mine, theirs in _of_both(own, first)
        if all(math.isfinite(nats) for nats, _ in _differences(mine, theirs))
    }
