"""The critics by name, and how one is made from a name and its settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from reward.ask import Asker
from reward.critics.base import Critic, Item, Judgement, Verdict
from reward.critics.claims import ClaimsCritic
from reward.critics.pairwise import PairwiseCritic
from reward.critics.panel import PanelCritic
from reward.critics.pointwise import PointwiseCritic
from reward.critics.random import RandomCritic
from reward.critics.scalar import ScalarCritic, Scorer
from reward.critics.verifier import VerifierCritic
from reward.errors import RewardError

__all__ = ["CRITICS", "Critic", "Item", "Judgement", "Verdict", "make_critic", "needs"]

CRITICS: dict[str, type] = {
    "pairwise": PairwiseCritic,
    "pointwise": PointwiseCritic,
    "claims": ClaimsCritic,
    "verifier": VerifierCritic,
    "scalar": ScalarCritic,
    "panel": PanelCritic,
    "random": RandomCritic,
}

_NEEDS = {"asker": "a model to ask", "scorer": "a reward model", "critics": "the critics of the panel"}


def needs(kind: str) -> str | None:
    """What must be handed to a critic of this kind: `asker`, `scorer`, `critics`, or None.

    >>> needs("pairwise"), needs("verifier")
    ('asker', None)
    """
    first = next(iter(inspect.signature(_class_of(kind)).parameters.values()), None)
    return first.name if first is not None and first.kind is first.POSITIONAL_OR_KEYWORD else None


def make_critic(
    kind: str,
    settings: Mapping[str, Any] | None = None,
    *,
    asker: Asker | None = None,
    scorer: Scorer | None = None,
    critics: Mapping[str, Critic] | None = None,
) -> Critic:
    """A critic of this kind with these settings and what it needs; RewardError says what is unknown or missing.

    `asker` is for the kinds that ask a model, `scorer` for `scalar`, `critics` (made before) for `panel`.

    >>> make_critic("random", {"sead": 3})
    Traceback (most recent call last):
    reward.errors.RewardError: critic random has no setting 'sead' (did you mean seed?); it has: seed
    """
    settings = settings or {}
    known = settings_of(kind)
    unknown = [name for name in settings if name not in known]
    if unknown:
        near = get_close_matches(unknown[0], known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise RewardError(f"critic {kind} has no setting {unknown[0]!r}{hint}; it has: {', '.join(known)}")
    given = {"asker": asker, "scorer": scorer, "critics": critics}
    needed = needs(kind)
    if needed is None:
        return _class_of(kind)(**settings)
    if given.get(needed) is None:
        raise RewardError(f"critic {kind} needs {_NEEDS[needed]}")
    return _class_of(kind)(given[needed], **settings)


def settings_of(kind: str) -> list[str]:
    """The names of the settings that a critic of this kind takes."""
    parameters = inspect.signature(_class_of(kind)).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _class_of(kind: str) -> type:
    if kind not in CRITICS:
        near = get_close_matches(kind, CRITICS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise RewardError(f"no critic is called {kind!r}{hint}; there are: {', '.join(CRITICS)}")
    return CRITICS[kind]
