"""The critics by name, and how one is made from a name and its settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from reward.critics.base import Critic, Item, Judgement, Verdict
from reward.critics.claims import ClaimsCritic
from reward.critics.length import LengthCritic
from reward.critics.pairwise import PairwiseCritic
from reward.critics.panel import PanelCritic
from reward.critics.pointwise import PointwiseCritic
from reward.critics.random import RandomCritic
from reward.critics.scalar import ScalarCritic, Scorer
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

CRITICS: dict[str, type] = {
    "pairwise": PairwiseCritic,
    "pointwise": PointwiseCritic,
    "claims": ClaimsCritic,
    "verifier": VerifierCritic,
    "scalar": ScalarCritic,
    "panel": PanelCritic,
    "random": RandomCritic,
    "length": LengthCritic,
}

_NEEDS = {"judge_model": "a model to ask", "scorer": "a reward model"}


def needs(kind: str) -> str | None:
    """What must be handed to a critic of this kind: `judge_model`, `scorer`, `critics`, or None.

    >>> needs("pairwise"), needs("verifier")
    ('judge_model', None)
    """
    first = next(iter(inspect.signature(_class_of(kind)).parameters.values()), None)
    return first.name if first is not None and first.kind is first.POSITIONAL_OR_KEYWORD else None


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
) -> Critic:
    """A critic of this kind with these settings and what it needs; RewardError says what is unknown or missing.

    `judge_model` is for the kinds that ask a model, `scorer` for `scalar`. A panel takes its members from
    `settings["critics"]`, name -> `{"kind": ..., further settings}`; `judge_models` and `scorers` give members models of
    their own.

    >>> make_critic("random", {"sead": 3})
    Traceback (most recent call last):
    reward.errors.RewardError: critic random has no setting 'sead' (did you mean seed?); it has: seed
    """
    given: dict[str, Any] = {"judge_model": judge_model, "scorer": scorer}
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
            )
            for name, member in members.items()
        }
    _check_options(kind, options)
    needed = needs(kind)
    if needed is None:
        return _class_of(kind)(**options)
    if given[needed] is None:
        raise RewardError(f"critic {kind} needs {_NEEDS[needed]}")
    return _class_of(kind)(given[needed], **options)


def _make_member(
    name: str, kind: str, settings: dict[str, Any], *, judge_model: JudgeModel | None, scorer: Scorer | None
) -> Critic:
    try:
        return make_critic(kind, settings, judge_model=judge_model, scorer=scorer)
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


def _check_options(kind: str, options: Mapping[str, Any]) -> None:
    """Names and types of settings, so that a slip in a YAML file never becomes a traceback."""
    known = settings_of(kind)
    unknown = [name for name in options if name not in known]
    if unknown:
        near = get_close_matches(unknown[0], known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise RewardError(f"critic {kind} has no setting {unknown[0]!r}{hint}; it has: {', '.join(known)}")
    hints = {name: p.annotation for name, p in inspect.signature(_class_of(kind), eval_str=True).parameters.items()}
    faults = [
        f"{name} must be {_in_words(hints[name])}, found {value!r}"
        for name, value in options.items()
        if not _fits(value, hints[name])
    ]
    if faults:
        raise RewardError(f"critic {kind}: " + "; ".join(faults))


def _fits(value: Any, hint: Any) -> bool:
    types = [get_origin(one) or one for one in _either(hint)]
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, tuple(types)) or (isinstance(value, int) and float in types)


def _either(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, UnionType) else (hint,)


def _in_words(hint: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "empty"}
    return " or ".join(
        dict.fromkeys(words.get(one, "text" if one is Path else "names with values") for one in _either(hint))
    )


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
