"""A response in; what it answers out: the marked final answer, numbers, option letters, yes or no, boxes.

English and Chinese; full-width characters are read as their plain forms. Nothing here knows the reference answer.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from reward.texts import normalise

# The reference answer of a question is held against every response to it.
_REMEMBERED = 1024
_MARKED = re.compile(
    r"(?:(?:final |correct )?answer(?: is)?\s*[:：]|(?:final|correct|the) answer"
    r" is|答案(?:是|为)?\s*[:：]|答案[是为]|答\s*[:：])\s*",
    re.IGNORECASE,
)
# A tag without an end is passed over by the next one, not by looking through the rest of the text.
_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL | re.IGNORECASE)
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")


@lru_cache(maxsize=_REMEMBERED)
def final_answer(text: str) -> str:
    """The part of a response that is its answer.

    The last `\\boxed{}`, else the last `<answer>`, else what follows the last "Answer:" (or "the answer is", or
    "答案是") on its line, else the whole text.

    >>> final_answer(r"So \\boxed{\\text{cat}}."), final_answer("答案：三只"), final_answer("Two cats.")
    ('cat', '三只', 'Two cats.')
    """
    text = unicodedata.normalize("NFKC", text)
    boxed = _last_boxed(text)
    if boxed is not None:
        return _plain(boxed)
    lower = text.lower()
    tags = _TAG.findall(text) if "<answer>" in lower else []
    if tags:
        return _plain(tags[-1])
    marks = list(_MARKED.finditer(text)) if "answer" in lower or "答" in text else []
    if marks:
        after = text[marks[-1].end() :].strip()
        if after.strip("*_ "):
            return _plain(after.splitlines()[0])
    return _plain(text)


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin + 1 : place]
    return text[begin + 1 :]


def _plain(text: str) -> str:
    if "\\" in text:
        text = _LATEX_TEXT.sub(r"\1", text)
        text = _LATEX_FRACTION.sub(r"\1/\2", text)
    return text.replace("\\%", "%").replace("**", "").replace("$", " ").strip()


@dataclass(frozen=True)
class Number:
    """A number as it was written; `value` of 50 % is 50."""

    value: float
    percent: bool
    start: int
    end: int


_DIGITS = re.compile(
    r"(?<![A-Za-z0-9_.])(?P<sign>[-+])?(?<![\d.])(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?P<exponent>e[-+]?\d+)?(?:\s*/\s*(?P<below>\d+(?:\.\d+)?))?\s?(?P<percent>%)?",
    re.IGNORECASE,
)
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen"
)
_WORDS = {word: value for value, word in enumerate(_UNITS.split())}
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS |= {word: 10 * value for value, word in enumerate(_TENS.split(), start=2)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}
_WORD = "|".join((*_WORDS, *_SCALES))
# As a pattern: the words of numbers up to a hundred.
SMALL_NUMBER_WORDS = "|".join((*_WORDS, "hundred"))
_ENGLISH = re.compile(rf"\b(?:{_WORD})(?:(?:[\s-]+(?:and\s+)?)(?:{_WORD}))*\b", re.IGNORECASE)
_CHINESE_DIGITS = {
    "零": 0,
    "〇": 0,
    "一": 1,
    "二": 2,
    "两": 2,
    "三": 3,
    "四": 4,
    "五": 5,
    "六": 6,
    "七": 7,
    "八": 8,
    "九": 9,
}
_CHINESE_UNITS = {"十": 10, "百": 100, "千": 1000}
_CHINESE_SCALES = {"万": 10_000, "亿": 100_000_000}
_CHINESE_SIGNS = "".join((*_CHINESE_DIGITS, *_CHINESE_UNITS, *_CHINESE_SCALES))
# A lone 一 or 十 stands in many words (一起, 十分), so in a text a numeral needs a measure word or an end after it.
_CHINESE = re.compile(
    rf"负?[{_CHINESE_SIGNS}]+(?:点[{''.join(_CHINESE_DIGITS)}]+)?"
    r"(?=$|[\s\W]|[个只条张位名头匹辆本件块元岁年月日天米人次种台架棵朵双对组度只支根座间层秒厘公斤克])"
)


def numbers(text: str) -> list[Number]:
    """The numbers in a text, in order. Number words count only where no digits are written.

    >>> [n.value for n in numbers("The largest one is -1,234.5, or 3/4, or 20%.")]
    [-1234.5, 0.75, 20.0]
    >>> [n.value for n in numbers("twenty-one dogs, and two hundred and five cats")]
    [21.0, 205.0]
    >>> [n.value for n in numbers("图中有一百零二只猫和两条狗，一起玩")]
    [102.0, 2.0]
    """
    # NFKC makes of ½ a 1, a fraction slash and a 2.
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("⁄", "/")
    found = [number for match in _DIGITS.finditer(text) if (number := _from_digits(match)) is not None]
    if found:
        return found
    found = [Number(english_number(match.group()), False, *match.span()) for match in _ENGLISH.finditer(text)]
    found += [Number(chinese_number(match.group()), False, *match.span()) for match in _CHINESE.finditer(text)]
    return sorted(found, key=lambda number: number.start)


def _from_digits(match: re.Match[str]) -> Number | None:
    value = float(match["digits"].replace(",", "") + (match["exponent"] or ""))
    if match["below"] is not None:
        below = float(match["below"])
        if below == 0:
            return None
        value /= below
    return Number(-value if match["sign"] == "-" else value, match["percent"] is not None, *match.span())


def english_number(text: str) -> float:
    """The value of an English numeral, as in "two hundred and five"; words that are none are passed over."""
    # Floats, which overflow to infinity: what a looping policy writes ("hundred hundred hundred ...") has no end.
    total, current = 0.0, 0.0
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in _WORDS:
            current += _WORDS[word]
        elif word == "hundred":
            current = max(current, 1.0) * 100
        elif word in _SCALES:
            total += max(current, 1.0) * _SCALES[word]
            current = 0.0
    return total + current


def chinese_number(text: str) -> float:
    """The value of a Chinese numeral, as in 一百零二 or 三点五."""
    sign, text = (-1, text[1:]) if text.startswith("负") else (1, text)
    whole, _, decimals = text.partition("点")
    value = _chinese_whole(whole)
    if decimals:
        value += float("0." + "".join(str(_CHINESE_DIGITS[char]) for char in decimals))
    return sign * value


def _chinese_whole(text: str) -> float:
    if all(char in _CHINESE_DIGITS for char in text):
        return float("".join(str(_CHINESE_DIGITS[char]) for char in text))
    total, section, digit = 0.0, 0.0, None
    for char in text:
        if char in _CHINESE_DIGITS:
            digit = _CHINESE_DIGITS[char]
        elif char in _CHINESE_UNITS:
            section += (1 if digit is None else digit) * _CHINESE_UNITS[char]
            digit = None
        else:
            total = (total + section + (digit or 0)) * _CHINESE_SCALES[char]
            section, digit = 0, None
    return total + section + (digit or 0)


_OPTION_LINE = re.compile(
    r"(?:^|(?<=[\s?:;,.。]))\(?([A-J])[).:、：](?:\s*)(.+?)(?=\s*(?:$|\n|\s\(?[A-J][).:、：]))", re.DOTALL
)
_LETTER_ALONE = re.compile(r"^[\s(\[]*([A-J])[\s)\].:,、。]*$", re.IGNORECASE)
_LETTER_FIRST = re.compile(r"^\s*(?:\(([A-J])\)|([A-J])\s*[).:、：]|([A-J])\s*\n)")
# A small a or i after these is a word: "my answer is a dog".
_LETTER_NAMED = re.compile(r"(?i:option|choice|answer is|选项|选择|选|应为)\s*[:：]?\s*\(?([A-Jb-hj])(?![A-Za-z])")
_LETTER_BRACKETED = re.compile(r"\(([A-J])\)")
_LETTER_LOOSE = re.compile(r"(?<![A-Za-z'])([A-J])(?![A-Za-z'])")


def options_of(question: str) -> dict[str, str]:
    """The lettered options that a question lists.

    >>> options_of("What is it?\\nA. a cat\\nB. a dog"), options_of("Which? (A) red (B) dark blue")
    ({'A': 'a cat', 'B': 'a dog'}, {'A': 'red', 'B': 'dark blue'})
    """
    question = unicodedata.normalize("NFKC", question)
    if "A" not in question:
        return {}
    options = {letter: text.strip() for letter, text in _OPTION_LINE.findall(question)}
    return options if len(options) > 1 and "A" in options else {}


def option_letter(text: str, options: dict[str, str]) -> str | None:
    """The option that an answer names, by letter or by the option's text; None if none or several.

    >>> option_letter("(B)", {}), option_letter("B. a dog", {}), option_letter("I think the answer is C.", {})
    ('B', 'B', 'C')
    >>> option_letter("A dog.", {"A": "a cat", "B": "a dog"}), option_letter("A cat or a bird", {})
    ('B', None)
    """
    text = unicodedata.normalize("NFKC", text).strip()
    alone = _LETTER_ALONE.match(text)
    if alone:
        return alone.group(1).upper()
    by_text = [letter for letter, option in options.items() if same_words(option, text)]
    if len(by_text) == 1:
        return by_text[0]
    first = _LETTER_FIRST.match(text)
    if first:
        return next(letter for letter in first.groups() if letter)
    for pattern in (_LETTER_NAMED, _LETTER_BRACKETED):
        named = {letter.upper() for letter in pattern.findall(text)}
        if named:
            return named.pop() if len(named) == 1 else None
    # "A" and "I" are English words too: such a letter must not be followed by a small-letter word other than "is".
    loose = {
        m.group(1)
        for m in _LETTER_LOOSE.finditer(text)
        if m.group(1) not in "AI" or not re.match(r"\s+(?!is\b)[a-z]", text[m.end() :])
    }
    return loose.pop() if len(loose) == 1 else None


_ARTICLE = re.compile(r"^(?:the|an|a) (?=\S)")


def same_words(one: str, other: str) -> bool:
    """Whether two short answers are the same but for case, punctuation and a leading article.

    >>> same_words("The red car.", "red car"), same_words("a", "b")
    (True, False)
    """
    return _bare(one) == _bare(other)


@lru_cache(maxsize=_REMEMBERED)
def _bare(text: str) -> str:
    return _ARTICLE.sub("", normalise(text))


_YES = re.compile(r"\b(?:yes|yeah|yep|true|correct)\b", re.IGNORECASE)
_NO = re.compile(r"\b(?:no|nope|not|false|incorrect)\b|n't\b", re.IGNORECASE)
_UNSURE = re.compile(
    r"\b(?:can't|cannot|can not|(?:'m|am) (?:unable|not able) to|don't|do not) "
    r"(?:tell|say|know|determine|answer|judge|help|assist)\b|\bnot (?:sure|certain|clear)\b|\bsorry\b",
    re.IGNORECASE,
)


def yes_or_no(text: str) -> bool | None:
    """Whether an answer says yes; None if it says neither or both, or that it cannot tell. Its first word decides.

    >>> [yes_or_no(text) for text in ("Yes, there is no doubt.", "No.", "没有", "是的，有。", "Perhaps", "It is not.")]
    [True, False, False, True, None, False]
    >>> [yes_or_no(text) for text in ("I can't tell.", "对不起，我不知道。")]
    [None, None]
    """
    text = unicodedata.normalize("NFKC", text).replace("’", "'").strip().strip("*\"'")
    if re.match(r"不(?!知道|清楚|确定|能确定)|没|否|无(?!法)|错", text):
        return False
    if re.match(r"是|有|对(?!不起)|正确|会|能", text):
        return True
    first_yes, first_no = _YES.match(text), _NO.match(text)
    unsure = _UNSURE.search(text)
    if (first_yes or first_no) and not (unsure and unsure.start() == 0):
        return first_yes is not None
    if unsure:
        return None
    says_yes, says_no = _YES.search(text) is not None, _NO.search(text) is not None
    return says_yes if says_yes != says_no else None


Box = tuple[float, float, float, float]
_N = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"[\[(]{_N},{_N},{_N},{_N}[\])]|\({_N},{_N}\)\s*,?\s*\({_N},{_N}\)")


def boxes(text: str) -> list[Box]:
    """The boxes (left, top, right, bottom) that a text names as `[a, b, c, d]` or `(a, b), (c, d)`.

    >>> boxes("<box>(1,2),(3,4)</box> and [[5, 6, 7.5, 8]]")
    [(1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.5, 8.0)]
    """
    text = unicodedata.normalize("NFKC", text)
    found = []
    for match in _BOX.finditer(text):
        left, top, right, bottom = (float(part) for part in match.groups() if part is not None)
        found.append((min(left, right), min(top, bottom), max(left, right), max(top, bottom)))
    return found


def without_boxes(text: str) -> str:
    """What a text says besides boxes."""
    return _BOX.sub(" ", unicodedata.normalize("NFKC", text))
