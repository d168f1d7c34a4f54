"""The formats by name: how rows are found in a source, and what is made of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from align.data.entry import Entry
from align.data.llava import read_llava, read_llava_preference
from align.data.mm_rlhf import read_mm_rlhf
from align.data.mmpr import mmpr_rows, read_mmpr
from align.data.plain import plain_reader
from align.data.povid import read_povid
from align.data.rlaif_v import read_rlaif_v, read_spa_vl
from align.data.rows import Row, read_rows
from align.data.vlfeedback import read_vlfeedback
from align.errors import UserError


@dataclass(frozen=True)
class Format:
    """`makes` is what comes out unless told otherwise: `questions` or `pairs` (None: pairs where the rows have them)."""

    read: Callable[[dict[str, Any]], Entry]
    makes: str | None
    rows: Callable[..., Iterator[Row]] = read_rows


FORMATS: dict[str, Format] = {
    "llava": Format(read_llava, "questions"),
    "llava-preference": Format(read_llava_preference, "pairs"),
    "mmpr": Format(read_mmpr, "pairs", mmpr_rows),
    "rlaif-v": Format(read_rlaif_v, "pairs"),
    "rlhf-v": Format(read_rlaif_v, "pairs"),
    "vlfeedback": Format(read_vlfeedback, "pairs"),
    "mm-rlhf": Format(read_mm_rlhf, "pairs"),
    "spa-vl": Format(read_spa_vl, "pairs"),
    "povid": Format(read_povid, "pairs"),
    "plain": Format(plain_reader({}), None),
}


def find_format(name: str, columns: Mapping[str, str]) -> Format:
    """The format of a name; `columns` are for `plain` only.

    Raises:
        UserError: there is no such format, or columns are named for one that has its own.
    """
    if name not in FORMATS:
        near = get_close_matches(name, FORMATS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"no format is called {name!r}{hint}", fix=f"there are: {', '.join(FORMATS)}")
    if columns and name != "plain":
        raise UserError(f"the columns of {name} are known", fix="--columns is for --format plain")
    return Format(plain_reader(columns), None) if columns else FORMATS[name]
