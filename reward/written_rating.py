"""A written judgement and the scale that was asked for in; the rating on 0-100, or the reason why there is none, out.

A judge often repeats its scale ("Rating (1-10): 7") or takes another one than it was asked for: a scale that is named
is the one the number is read on, and never the rating itself. What is not clear is unscored, never guessed.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from reward.answers import SMALL_NUMBER_WORDS, chinese_number, english_number

RANGE = "the critic gave a range or a bound instead of a rating"
SEVERAL = "the critic gave several different ratings"
SCALES = "the critic named several scales"
OUTSIDE = "the critic gave a rating outside of its scale"
FRACTION = "the critic gave a fraction of one on a scale up to 100"
STARS = "the critic gave stars and did not say of how many"
NO_RATING = "no rating"

# Characters that are read at either end of a judgement, and before a number.
LONGEST_END, NEAR = 2000, 40

Scale = tuple[float, float]


@dataclass(frozen=True)
class Rating:
    """`value` is on 0-100; None where there is none, and then `reason` says why."""

    value: float | None
    reason: str = ""


_N = r"(?<![\d.])-?\d+(?:\.\d+)?"
_UNIT = r"(?:\s*(?:points?|pts\.?|marks?|stars?|分|颗?星))?"
_OF = r"(?:/|out\s+of(?:\s+a)?(?:\s+(?:possible|maximum(?:\s+of)?|total\s+of))?|of\s+a\s+possible)"
_TO = r"\s*(?:-|–|—|~|\.\.\.?|to|and|至|到)\s*"
_SPAN = rf"({_N}){_UNIT}{_TO}({_N}){_UNIT}"
_VALUE = rf"(?P<value>{_N})\s*\**(?:(?P<percent>%)|{_UNIT}\s*\**\s*{_OF}\s*\**\s*(?P<top>{_N})(?![\d/])|)"
# What is named as a score may also be "8 of 10"; elsewhere that counts things.
_NAMED_VALUE = _VALUE.replace(_OF, rf"(?:{_OF}|of)")
_NAME = r"(?:\b(?:score|rating|grade|rate)[ds]?\b|(?<!\d )\bmarks?\b|评分|得分|分数|打分|总分|评级|给分)"
_FINAL = r"(?:(?<!\d )\b(?:overall|final|total)\b|最终|总体|综合|总)"
# What an end of a scale stands for: "0 (worst) to 10 (best)", "1 = bad, 5 = good", "0 is worst and 100 is best".
_MEANS = r"\s*(?:\([^()\d]{1,20}\)|(?:=|:|\b(?:is|means|being|for)\b|代表|表示|是|为)[^\d,;()\[\]]{1,25}?)"

# Scales, each with its two ends or its top alone.
_SPANS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"[(\[]\s*[^()\[\]\d]{{0,30}}?{_SPAN}[^()\[\]\d]{{0,30}}[)\]]",
        rf"(?:\bon\s+)?(?:\b(?:a|the)\s+)?(?:scale|range|范围)\s*(?:of|from|is|是|为|[:：])?\s*{_SPAN}",
        rf"(?:\bwhere\s+|\bfrom\s+|[(\[]\s*)?({_N}){_MEANS}\s*(?:[,;]|\bto\b|\band\b|[-–—~至到])\s*(?:and\s+)?"
        rf"({_N}){_MEANS}(?=\s*[)\],.;:]|$)[)\]]?",
        rf"\bon\s+(?:a|the)\s+{_SPAN}\s*(?:point\s+)?scale",
        rf"\b(?:from|between)\s+{_SPAN}",
        rf"(?:\bfrom\s+|从)?{_SPAN}(?=\s*(?:scale|分制|{_NAME}|[:：=]\s*\**\s*-?\d))",
    )
)
_TOPS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"[(\[]\s*(?:out\s+of|of|max(?:imum|\.)?(?:\s+of)?|/|满分(?:为|是)?|共)\s*[:：]?\s*({_N}){_UNIT}\s*[)\]]",
        rf"[(\[]\s*({_N}){_UNIT}\s*(?:max(?:imum|\.)?)\s*[)\]]",
        # "Score out of 10: 8", "Score/100: 85"; "Out of 10, I give 8".
        rf"(?<!\d)(?<!\d\s)(?:/|\bout\s+of|\bof)\s*({_N}){_UNIT}\s*(?=[:=]\s*\**\s*-?\d)",
        rf"(?:^|(?<=[.\n])\s*)(?:out\s+)?of\s+(?:a\s+possible\s+)?({_N}){_UNIT}\s*[,:]",
        rf"\bon\s+(?:a|the)\s+({_N})[\s-]*point\s+scale",
        rf"\bon\s+(?:a|the)\s+scale\s+of\s+({_N})(?!\s*(?:-|–|to)\s*\d)",
        rf"满分(?:为|是)?\s*({_N})\s*分?",
        rf"({_N})\s*分?\s*(?:满分|分?制)",
        rf"(?:总分|总共|一共)(?:为|是)?\s*({_N})\s*分(?=[，,;；\s][^。.]{{0,20}}[给得打评]\D{{0,6}}\d)",
        rf"\bmax(?:imum|\.)?(?:[\s_](?:score|rating|points?))?[\"']?\s*(?:of|is|[:：=])?\s*({_N}){_UNIT}",
    )
)
_TOPS_OF_SCALES = {1, 3, 4, 5, 6, 7, 8, 9, 10, 20, 50, 100, 1000}

_FORMS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\[\[\s*{_VALUE}\s*\]\]",
        rf"{_FINAL}\s*{_NAME}?\D{{0,25}}?{_NAMED_VALUE}",
        rf"{_NAME}\D{{0,25}}?{_NAMED_VALUE}",
        rf"{_VALUE}(?<!\D)\s*(?:分(?!之)|points?\b|marks?\b)(?!\s*{_OF}\s*\**\s*\d)",
        rf"(?P<value>{_N}){_UNIT}\s*{_OF}\s*(?P<top>{_N})(?![\d/])(?P<percent>)",
        rf"(?<![A-Za-z0-9_.]){_VALUE}(?![A-Za-z0-9_]|\.\d)",
    )
)
_BOUND_BEFORE = re.compile(
    r"(?:at\s+(?:least|most)|(?:more|less|higher|lower|greater)\s+than|over|above|below|under|up\s+to|between|[<>≤≥]=?"
    r"|至少|最多|超过|不到|低于|高于|大于|小于|介于|\d\s*(?:-|–|—|~|to|or|至|到|或))\s*\**$",
    re.IGNORECASE,
)
_RANGE_AFTER = re.compile(
    rf"\**{_UNIT}\s*(?:%\s*)?(?:-|–|—|~|to|or|±|\+/-|至|到|或)\s*\**\s*\d"
    r"|\s*(?:分|points?)?\s*(?:以上|以下|左右到|at\s+(?:best|most|least))|\+(?!\s*\d)",
    re.IGNORECASE,
)
_BETWEEN = re.compile(rf"between\s*{_SPAN}|介于|\d{_UNIT}(?:\s*(?:~|–|—|至|到)\s*|\s*-\s*|\s+to\s+)\d", re.IGNORECASE)
_NUMERAL = rf"(?:{SMALL_NUMBER_WORDS})(?:[\s-]+(?:{SMALL_NUMBER_WORDS}))*\b"
_IN_WORDS = re.compile(rf"\b(?:a\s+)?{_NUMERAL}", re.IGNORECASE)
_STARS = re.compile(r"\**\s*-?\s*(?:stars?\b|颗?星)", re.IGNORECASE)
# "Response 2: 85": a number that says which, not how good. What was taken away is no rating either.
_LABEL = re.compile(
    r"(?:\b(?:response|answer|reply|assistant|candidate|option|model|step|question|image)\s*#?\s*|[回答复案]\s*|#)\d+"
    r"(?=\s*(?:[:)]|is\b|gets?\b|的|得|score|rating))",
    re.IGNORECASE,
)
_DEDUCTED = re.compile(
    rf"(?:\b(?:deduct(?:ed|ing)?|subtract(?:ed|ing)?|lost|loses)\s+|扣(?:除|掉)?了?\s*|减去?\s*){_N}{_UNIT}",
    re.IGNORECASE,
)
_MIXED = re.compile(r"(?<![\d./])(\d+)\s*(?:([¼½¾⅓⅔])|\s([1-3])/([2-4])(?![\d/]))")
_SCALE_WORD = re.compile(
    rf"(?:(?<=out of )|(?<=scale of )|(?<=scale from )|(?<=to )){_NUMERAL}"
    rf"|\b{_NUMERAL}(?=[\s-]*point\b|\s+to\s+(?:{SMALL_NUMBER_WORDS})\b)",
    re.IGNORECASE,
)
_CHINESE = "[零〇一二两三四五六七八九十百]"
_CHINESE_NAMED = re.compile(rf"((?:评分|得分|分数|打分|总分|给分)\s*[:：是为]?\s*)({_CHINESE}+)(?!{_CHINESE}|[之成点])")
_CHINESE_RATING = re.compile(rf"({_CHINESE}+(?:点{_CHINESE}+)?)(?=\s*分(?![之类]|\s*制))")
_NAMED_SCALES = {"百分制": 100, "十分制": 10, "五分制": 5}


def read_rating(text: str, scale: Scale) -> Rating:
    """The rating in a written judgement, brought from its scale (`scale`, unless it names another one) to 0-100.

    In this order: `[[80]]`; a number named as overall or final score; one named as score, perhaps out of another
    ("Score: 8/10"); `85 points`, `80分`; `80/100` or `8 out of 10`; the only number there is. Where one form is written
    several times the numbers must agree.

    >>> [read_rating(text, (0, 100)).value for text in ("Score (0-100): 85. 2 cats.", "Rating: 8/10", "80分", "120")]
    [85.0, 80.0, 80.0, None]
    >>> read_rating("between 80 and 90", (0, 100)).reason == RANGE
    True
    """
    text, written_in_digits = _in_digits(text)
    text, scales = _take_scales(text, scale)
    text = _DEDUCTED.sub(" ", text)
    if len(scales) > 1:
        return Rating(None, SCALES)
    named = next(iter(scales), scale)
    for place, form in enumerate(_FORMS):
        if place == len(_FORMS) - 1 and not (written_in_digits or scales):
            break
        found = {_read(match, text, named, scale) for match in form.finditer(text)}
        if len(found) == 1:
            return found.pop()
        if found:
            return Rating(None, RANGE if _BETWEEN.search(text) else SEVERAL)
    return Rating(None, NO_RATING)


def _in_digits(text: str) -> tuple[str, bool]:
    """The text with plain digits, points for decimal commas and digits for number words; whether it had any digits.

    Words count only where no digits are written: "one" is a common word.
    """
    text = _MIXED.sub(_decimal, text)
    text = re.sub(r"\s+", _one_space, unicodedata.normalize("NFKC", text))
    if len(text) > 2 * LONGEST_END:
        # A rating stands at the beginning or the end; a judge that loops writes a lot in between.
        text = f"{text[:LONGEST_END]} ... {text[-LONGEST_END:]}"
    text = text.replace("−", "-").replace("．", ".")
    text = re.sub(rf"(?:负|\bminus\s+)(?=\d|(?:{SMALL_NUMBER_WORDS})\b)", "-", text, flags=re.I)
    text = re.sub(r"([(\[]\s*[01])\s*[,;]\s*(?=\d+\s*[)\]])", r"\1-", text)
    text = re.sub(r"(?<=\d)\s*\.{2,3}\s*(?=\d)", "-", text)
    text = _LABEL.sub(" ", text)
    text = re.sub(r"</?[A-Za-z_]\w*>", " ", text)
    text = re.sub(r"(?<![\w.])\d+(?:\.\d+)?e[+-]?\d\d?(?!\w)", lambda found: f"{float(found[0]):.9g}", text, flags=re.I)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<![\d.])(\d+),(?=\d{1,2}(?!\d))", r"\1.", text)
    text = re.sub(rf"百分之({_CHINESE}+|\d+)", lambda found: f"{_plain(found[1])}%", text)
    for name, top in _NAMED_SCALES.items():
        text = text.replace(name, f"{top}分制")
    text = _CHINESE_NAMED.sub(lambda found: found[1] + _plain(found[2]), text)
    if re.fullmatch(rf"\s*(?:{_CHINESE}+|{_IN_WORDS.pattern})\s*(?:%|percent)?[.。!]?\s*", text, re.IGNORECASE):
        # Nothing but a number.
        text = re.sub(rf"{_CHINESE}+", lambda found: _plain(found[0]), text)
        return _IN_WORDS.sub(_english, text).replace("percent", "%"), True
    had_digits = re.search(r"\d", re.sub(r"\d+分制", "", text)) is not None
    text = re.sub(rf"满分(?:为|是)?({_CHINESE}+)", lambda found: f"满分{_plain(found[1])}", text)
    # 十分 alone is "very".
    text = _CHINESE_RATING.sub(
        lambda found: found[0] if found[0] == "十" and not _is_rated(text[: found.start()]) else _plain(found[1]), text
    )
    if had_digits:
        return _SCALE_WORD.sub(_english, text), True
    return _IN_WORDS.sub(_english, text), False


def _english(found: re.Match[str]) -> str:
    return f"{english_number(re.sub('^a ', '', found[0], flags=re.I)):g}"


def _decimal(found: re.Match[str]) -> str:
    """A whole number and a fraction, as in 3½ or 3 1/2."""
    part = unicodedata.numeric(found[2]) if found[2] else int(found[3]) / int(found[4])
    return f"{int(found[1]) + part:.4g}" if part < 1 else found[0]


def _one_space(found: re.Match[str]) -> str:
    return "\n" if "\n" in found[0] else " "


def _plain(number: str) -> str:
    return number if number.isdigit() else f"{chinese_number(number):g}"


def _is_rated(before: str) -> bool:
    return re.search(r"(?:评分|得分|分数|打分|总分|给分|打|给|得|满分|[:：是为])\s*$", before) is not None


def _take_scales(text: str, asked: Scale) -> tuple[str, set[Scale]]:
    """The text without the scales that it names, and those scales."""
    scales: set[Scale] = set()
    for pattern in _SPANS:
        text = pattern.sub(lambda found: _noted(found, (float(found[1]), float(found[2])), asked, scales), text)
    for pattern in _TOPS:
        text = pattern.sub(lambda found: _noted(found, _up_to(float(found[1]), asked), asked, scales), text)
    return text, scales


def _noted(found: re.Match[str], scale: Scale, asked: Scale, scales: set[Scale]) -> str:
    """Nothing in place of a scale; a range that is none (80-90) stays."""
    if scale != asked and not (scale[0] in (0, 1) and scale[0] < scale[1] and scale[1] in _TOPS_OF_SCALES):
        return found[0]
    scales.add(scale)
    return " "


def _up_to(top: float, asked: Scale) -> Scale:
    """The scale whose top is named: the one that was asked for where that fits, else one from 0."""
    return asked if top == asked[1] else (0.0, top)


def _read(match: re.Match[str], text: str, named: Scale, asked: Scale) -> Rating:
    before = text[max(0, match.start("value") - NEAR) : match.start("value")]
    in_span = match["value"].startswith("-") and before[-1:].isdigit()
    if in_span or _BOUND_BEFORE.search(before) or _RANGE_AFTER.match(text, match.end()):
        return Rating(None, RANGE)
    value = float(match["value"])
    if not match["top"] and named == asked and named[1] > 10 and _STARS.match(text, match.end("value")):
        return Rating(None, STARS)
    if match["percent"]:
        low, high = 0.0, 100.0
    else:
        low, high = _up_to(float(match["top"]), asked) if match["top"] else named
    if not (low <= value <= high and high > low):
        return Rating(None, OUTSIDE)
    if 0 < value < 1 and high >= 100 and not match["percent"]:
        return Rating(None, FRACTION)
    return Rating(round(100.0 * (value - low) / (high - low), 9))
