"""The critics by name, and how one is made from a name and its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from reward.critics.base import BaseCritic, Critic, Item, Judgement, Verdict
from reward.critics.claims import ClaimsCritic
from reward.critics.length import LengthCritic
from reward.critics.pairwise import PairwiseCritic
from reward.critics.panel import PanelCritic
from reward.critics.pointwise import PointwiseCritic
from reward.critics.python import PythonCritic
from reward.critics.random import RandomCritic
from reward.critics.ratings import RatingsCritic
from reward.critics.scalar import ScalarCritic, Scorer
from reward.critics.scores import ScoresCritic
from reward.critics.verifier import VerifierCritic
from reward.errors import RewardError
from reward.judge_model import JudgeModel

__all__ = [
    "CRITICS",
    "Critic",
    "Item",
    "Judgement",
    "Verdict",
    "make_critic",
    "needs",
    "settings_of",
    "uses_judge_model",
]

CRITICS: dict[str, type[BaseCritic]] = {
    "pairwise": PairwiseCritic,
    "pointwise": PointwiseCritic,
    "claims": ClaimsCritic,
    "verifier": VerifierCritic,
    "scalar": ScalarCritic,
    "panel": PanelCritic,
    "python": PythonCritic,
    "scores": ScoresCritic,
    "ratings": RatingsCritic,
    "random": RandomCritic,
    "length": LengthCritic,
}

_NEEDS = {"judge_model": "a model to ask", "scorer": "a reward model"}


def needs(kind: str) -> str | None:
    """What must be handed to a critic of this kind: `judge_model`, `scorer`, `critics`, or None.

    >>> needs("pairwise"), needs("verifier")
    ('judge_model', None)
    """
    fields = _class_of(kind).model_fields
    return next((name for name in ("judge_model", "scorer", "critics") if name in fields), None)


def uses_judge_model(kind: str, settings: Mapping[str, Any] | None = None) -> bool:
    """Whether a critic with these settings, or a member of its panel, asks a model.

    >>> uses_judge_model("panel", {"critics": {"a": {"kind": "verifier"}, "b": {"kind": "pointwise"}}})
    True
    """
    if kind != "panel":
        return needs(kind) == "judge_model"
    return any(uses_judge_model(member, options) for member, options in _members(settings or {}).values())


def make_critic(
    kind: str,
    settings: Mapping[str, Any] | None = None,
    *,
    judge_model: JudgeModel | None = None,
    scorer: Scorer | None = None,
    judge_models: Mapping[str, JudgeModel] | None = None,
    scorers: Mapping[str, Scorer] | None = None,
    open_image: Callable[[Any], Any] | None = None,
) -> Critic:
    """A critic of this kind with these settings and what it needs; RewardError says what is unknown, wrong or missing.

    `judge_model` is for the kinds that ask a model, `scorer` for `scalar`, `open_image` (a handle in, a picture out)
    for `python`. A panel takes its members from `settings["critics"]`, name -> `{"kind": ..., further settings}`;
    `judge_models` and `scorers` give members models of their own.

    >>> make_critic("random", {"sead": 3})
    Traceback (most recent call last):
    reward.errors.RewardError: critic random has no setting 'sead' (did you mean seed?); it has: seed
    """
    given: dict[str, Any] = {"judge_model": judge_model, "scorer": scorer, "open_image": open_image}
    options = dict(settings or {})
    if kind == "panel":
        members = _members(options)
        options.pop("critics")
        given["critics"] = {
            name: _make_member(
                name,
                *member,
                judge_model=(judge_models or {}).get(name, judge_model),
                scorer=(scorers or {}).get(name, scorer),
                open_image=open_image,
            )
            for name, member in members.items()
        }
    _check_names(kind, options)
    needed, made = needs(kind), _class_of(kind)
    if needed is not None and given[needed] is None:
        raise RewardError(f"critic {kind} needs {_NEEDS[needed]}")
    try:
        return made(**{name: value for name, value in given.items() if name in made.model_fields}, **options)
    except ValidationError as error:
        raise RewardError(f"critic {kind}: " + "; ".join(map(_fault, error.errors()))) from None


def _fault(error: Any) -> str:
    """
    >>> _fault({"type": "int_type", "loc": ("rounds",), "msg": "Input should be a valid integer", "input": 2.5})
    'rounds: Input should be a valid integer, found 2.5'
    """
    if error["type"] == "missing":
        return f"{error['loc'][0]} must be given"
    if not error["loc"]:
        return error["msg"].removeprefix("Value error, ")
    return f"{'.'.join(map(str, error['loc']))}: {error['msg']}, found {error['input']!r}"


def _make_member(name: str, kind: str, settings: dict[str, Any], **given: Any) -> Critic:
    try:
        return make_critic(kind, settings, **given)
    except RewardError as error:
        raise RewardError(f"panel, member {name}: {error}") from None


def _members(settings: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """The kind and the settings of a panel's members, by name."""
    critics = settings.get("critics")
    if not isinstance(critics, Mapping) or not critics:
        raise RewardError("a panel needs its critics by name, as in critics: {rule: {kind: verifier}}")
    members = {}
    for name, options in critics.items():
        if not isinstance(options, Mapping) or not isinstance(options.get("kind"), str):
            raise RewardError(f"panel, member {name}: expected settings with 'kind', found {options!r}")
        members[str(name)] = (options["kind"], {key: value for key, value in options.items() if key != "kind"})
    return members


def _check_names(kind: str, options: Mapping[str, Any]) -> None:
    known = settings_of(kind)
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise RewardError(f"critic {kind} has no setting {name!r}{hint}; it has: {', '.join(known) or 'none'}")


def settings_of(kind: str) -> list[str]:
    """The names of the settings that a critic of this kind takes."""
    return [name for name, field in _class_of(kind).model_fields.items() if not field.exclude]


def _class_of(kind: str) -> type[BaseCritic]:
    if kind not in CRITICS:
        near = get_close_matches(kind, CRITICS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise RewardError(f"no critic is called {kind!r}{hint}; there are: {', '.join(CRITICS)}")
    return CRITICS[kind]
