"""Critic prompts: a data file in; a checked template that makes prompts out.

A prompt file is text with named slots under a YAML heading:

    ---
    kind: pairwise
    system: You are an unbiased judge.
    options: {first: first, second: second, tie: equal}
    ---
    Question: [{question}]
    The first response: [{first}]
    The second response: [{second}]
    Which is better?

The images of the question always stand before this text. `{word}` is a slot, `{{word}}` is written as `{word}`, any
other brace is text. What is wrong with a file is said before anything runs, all of it at once.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from reward.errors import RewardError
from reward.judge_model import BranchedPrompt

_FOLDER = Path(__file__).parent / "prompts"
_SLOT = re.compile(r"\{\{([a-z_]+)\}\}|\{([a-z_]+)\}")
_HEADING = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*\n", re.DOTALL | re.MULTILINE)
_KEYS = ("kind", "system", "options", "scale")


@dataclass(frozen=True)
class _Kind:
    """Which slots a kind of prompt has (varying ones in their order), and which options."""

    varying: tuple[str, ...]
    question_needed: bool
    options: tuple[str, ...]
    optional: tuple[str, ...] = ()


KINDS = {
    "pairwise": _Kind(("first", "second"), True, ("first", "second"), ("tie",)),
    "pointwise": _Kind(("response",), True, ()),
    "claims": _Kind(("claim",), False, ("correct", "wrong")),
    "split": _Kind(("response",), False, ()),
}


@dataclass(frozen=True)
class Prompt:
    """A checked template. `literals` surround `slots`: literal 0, slot 0, literal 1, slot 1, ..., last literal."""

    name: str
    kind: str
    system: str | None
    literals: tuple[str, ...]
    slots: tuple[str, ...]
    options: dict[str, str]
    scale: tuple[float, float]
    digest: str

    def fill(self, images: tuple[Any, ...], question: str, branches: Sequence[tuple[str, ...]]) -> BranchedPrompt:
        """One prompt whose branches fill the varying slots in their order.

        All that stands before the first varying slot becomes the head; each piece carries one varying text and what
        follows it, so that branches with the same first response share it; the rest is the tail.
        """
        start = len(self.slots) - len(KINDS[self.kind].varying)
        head = "".join(literal + question for literal in self.literals[:start]) + self.literals[start]
        between = (*self.literals[start + 1 : -1], "")
        pieces = tuple(tuple(text + after for text, after in zip(b, between, strict=True)) for b in branches)
        return BranchedPrompt(images, self.system, head, pieces, self.literals[-1], tuple(self.options.values()))


def load_prompt(name: str | Path, kind: str) -> Prompt:
    """Load a built-in prompt by name or a person's own file by path, and check it for its kind.

    Raises RewardError with every fault of the file.
    """
    path = _find(name)
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"prompt file {path} cannot be read: {error}") from error
    return parse_prompt(source, kind, where=str(name))


def built_in_prompts() -> list[str]:
    """The names under which prompts come with this package."""
    return sorted(path.stem for path in _FOLDER.glob("*.md"))


def _find(name: str | Path) -> Path:
    built_in = _FOLDER / f"{name}.md"
    if str(name) in built_in_prompts():
        return built_in
    if Path(name).is_file():
        return Path(name)
    names = built_in_prompts()
    near = get_close_matches(str(name), names, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise RewardError(
        f"no prompt {str(name)!r}{hint}: give one of {', '.join(names)}, or the path of a prompt file that exists"
    )


def parse_prompt(source: str, kind: str, *, where: str = "prompt") -> Prompt:
    """Check a prompt file's text and take it apart.

    >>> text = "Q: {question} A: {response} Right?"
    >>> parse_prompt(text, "pointwise").fill((), "Why?", [("So.",), ("No.",)]).branches
    (('So.',), ('No.',))
    """
    if kind not in KINDS:
        raise RewardError(f"{where}: no prompt is of kind {kind!r}; kinds: {', '.join(KINDS)}")
    source = source.replace("\r\n", "\n").removeprefix("\ufeff")
    heading, body = _split_heading(source, where)
    literals, slots = _split_slots(body.strip("\n"))
    options, faults = _read_options(heading, kind)
    scale, scale_faults = _read_scale(heading)
    faults += _slot_faults(slots, kind) + _heading_faults(heading, kind) + scale_faults
    if kind == "pointwise" and not faults:
        faults += _rating_faults(options, scale)
    if faults:
        raise RewardError(f"prompt {where}: " + "; ".join(faults))
    digest = hashlib.sha256(source.encode()).hexdigest()
    return Prompt(where, kind, heading.get("system"), literals, slots, options, scale, digest)


def _split_heading(source: str, where: str) -> tuple[dict[str, Any], str]:
    match = _HEADING.match(source)
    if match is None:
        if source.startswith("---"):
            raise RewardError(f"prompt {where}: the heading that starts with --- has no closing line ---")
        return {}, source
    try:
        heading = yaml.safe_load(match.group(1)) or {}
    except yaml.YAMLError as error:
        raise RewardError(f"prompt {where}: the heading is not YAML: {error}") from error
    if not isinstance(heading, dict):
        raise RewardError(f"prompt {where}: the heading must be keys and values, found {type(heading).__name__}")
    return heading, source[match.end() :]


def _split_slots(body: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    literals, slots, end = [""], [], 0
    for match in _SLOT.finditer(body):
        literals[-1] += body[end : match.start()]
        end = match.end()
        if match.group(1):
            literals[-1] += "{" + match.group(1) + "}"
        else:
            slots.append(match.group(2))
            literals.append("")
    literals[-1] += body[end:]
    return tuple(literals), tuple(slots)


def _slot_faults(slots: tuple[str, ...], kind: str) -> list[str]:
    rules = KINDS[kind]
    known = ("question", *rules.varying)
    faults = []
    for slot in dict.fromkeys(slots):
        if slot not in known:
            why = "images always stand before the text" if slot.startswith("image") else _known_slots(known)
            faults.append(f"unknown slot {{{slot}}}: {why}")
        elif slots.count(slot) > 1:
            faults.append(f"slot {{{slot}}} stands {slots.count(slot)} times, expected once")
    needed = known if rules.question_needed else rules.varying
    faults += [f"missing slot {{{slot}}}" for slot in needed if slot not in slots]
    return faults or _order_faults(slots, rules)


def _known_slots(known: tuple[str, ...]) -> str:
    return "this kind of prompt has " + ", ".join(f"{{{slot}}}" for slot in known)


def _order_faults(slots: tuple[str, ...], rules: _Kind) -> list[str]:
    expected = [slot for slot in ("question", *rules.varying) if slot in slots]
    if list(slots) == expected:
        return []
    order = ", ".join(f"{{{slot}}}" for slot in expected)
    return [
        f"slots must stand in the order {order}: images and question are the same for all responses and are encoded "
        "once, so they come before anything that varies"
    ]


def _heading_faults(heading: dict[str, Any], kind: str) -> list[str]:
    faults = [f"unknown key {key!r} in the heading; known: {', '.join(_KEYS)}" for key in heading if key not in _KEYS]
    if heading.get("kind", kind) != kind:
        faults.append(f"it is of kind {heading['kind']!r}, expected {kind!r}")
    if not isinstance(heading.get("system"), str | None):
        faults.append("system must be text")
    return faults


def _read_options(heading: dict[str, Any], kind: str) -> tuple[dict[str, str], list[str]]:
    raw, rules = heading.get("options") or {}, KINDS[kind]
    if not isinstance(raw, dict):
        return {}, [f"options must be names with texts, found {type(raw).__name__}"]
    options = {str(name): str(text) for name, text in raw.items()}
    faults = [f"option {name!r} is true/false in YAML: put its text in quotes" for name in _truths(raw)]
    if options and rules.options:
        known = rules.options + rules.optional
        faults += [f"missing option {name!r}" for name in rules.options if name not in options]
        faults += [f"unknown option {name!r}; known: {', '.join(known)}" for name in options if name not in known]
    return options, faults + _overlap_faults(options)


def _truths(raw: dict[Any, Any]) -> list[str]:
    return [str(name) for name, text in raw.items() if isinstance(text, bool) or isinstance(name, bool)]


def _overlap_faults(options: dict[str, str]) -> list[str]:
    """An option's probability is that of the answer beginning with it, so none may begin another."""
    faults = [f"option {name!r} is empty" for name, text in options.items() if not text.strip()]
    for name, text in options.items():
        for other, longer in options.items():
            if name != other and text.strip() and longer.startswith(text):
                faults.append(
                    f"option {name!r} ({text!r}) begins option {other!r} ({longer!r}), so their probabilities overlap; "
                    "end both with something that tells them apart"
                )
    return faults


def _read_scale(heading: dict[str, Any]) -> tuple[tuple[float, float], list[str]]:
    scale = heading.get("scale", [0, 100])
    is_range = isinstance(scale, list) and len(scale) == 2 and all(isinstance(end, int | float) for end in scale)
    if not is_range or not scale[0] < scale[1]:
        return (0.0, 100.0), [f"scale must be [lowest, highest], found {scale!r}"]
    return (float(scale[0]), float(scale[1])), []


def _rating_faults(options: dict[str, str], scale: tuple[float, float]) -> list[str]:
    faults = []
    for name in options:
        value = as_number(name)
        if value is None or not scale[0] <= value <= scale[1]:
            faults.append(f"option {name!r} must be a rating from {scale[0]:g} to {scale[1]:g}")
    return faults


def as_number(text: str) -> float | None:
    """A finite number, or None.

    >>> as_number("12.5"), as_number("nan"), as_number("x")
    (12.5, None, None)
    """
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
