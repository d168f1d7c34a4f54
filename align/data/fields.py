"""A row in; its values by name out, and a record of what became of every column.

A reader takes a column for a role (`images`, `question`, ...). What nobody took is unused, and the import says so: no
column is dropped silently, whatever the reader.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from align.data.entry import BadRow


class Fields:
    """The columns of one row. `columns` maps the name that a reader asks for to the column that holds it,
    where they differ.

    Names are found whatever their case. None, NaN, blank text and empty lists are missing values, as tables write them.

    >>> row = Fields({"image": "a.png", "text": "What?", "note": "x"}, {"question": "text"})
    >>> row.text("question", "question", "prompt"), row.images("image"), row.unused
    ('What?', ['a.png'], ['note'])
    """

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> None:
        self._row = row
        self._columns = columns or {}
        self._by_lower = {str(name).strip().lower(): name for name in row}
        self.became: dict[str, str] = {}
        self._noted: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def get(self, name: str) -> Any:
        """The value under a name, None where it is missing; taken for nothing."""
        value = self._row.get(self._column(name))
        return None if is_missing(value) else value

    def has(self, *names: str) -> bool:
        """Whether every one of the names has a value."""
        return all(self.get(name) is not None for name in names)

    def take(self, role: str, *names: str) -> Any:
        """The value of the first of `names` (`role` itself by default) that has one; its column became `role`."""
        for name in self._asked(role, names):
            value = self.get(name)
            if value is not None:
                self._mark(name, role)
                return value
        return None

    def text(self, role: str, *names: str) -> str:
        """As `take`, but there must be text: BadRow where the column is missing, empty or something else."""
        names = self._asked(role, names)
        for name in names:
            column = self._column(name)
            value = self._row.get(column)
            if value is None or (isinstance(value, float) and math.isnan(value)):
                continue
            if not isinstance(value, str):
                raise BadRow(f"{column} is no text", f"found {type(value).__name__}")
            if not value.strip():
                raise BadRow(f"{column} is empty")
            self._mark(name, role)
            return value
        raise BadRow(f"no {self._column(names[0])}", f"the row has {', '.join(map(str, self._row)) or 'nothing'}")

    def label(self, role: str, *names: str) -> str | None:
        """A text, or a number as text; None where it is missing. BadRow for lists and the like.

        >>> Fields({"answer": 3.0}).label("answer"), Fields({"answer": float("nan")}).label("answer")
        ('3', None)
        """
        value = self.take(role, *names)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a whole number in a column with gaps, as pandas writes it
        if value is None or isinstance(value, (str, int, float, bool, Decimal)):
            return None if value is None else str(value)
        raise BadRow(f"{role} is no text", f"found {type(value).__name__}")

    def optional_text(self, role: str, *names: str) -> str | None:
        """As `text`, but None where the column is missing."""
        return self.text(role, *names) if any(self.has(name) for name in self._asked(role, names)) else None

    def object(self, role: str, *names: str) -> dict[str, Any]:
        """An object (or one as JSON in a cell), empty where there is none; what is no object stays unused."""
        for name in self._asked(role, names):
            value = unpacked(self.get(name))
            if isinstance(value, dict):
                self._mark(name, role)
                return value
        return {}

    def images(self, *names: str) -> list[Any]:
        """The images under the first of `names` that has any: a list, one image,
        or a JSON list in a cell of a table."""
        value = unpacked(self.take("images", *names))
        return [item for item in (value if isinstance(value, list) else [value]) if not is_missing(item)]

    def video(self, *names: str) -> str | None:
        """The path of the one video of a row; BadRow where there are several."""
        value = unpacked(self.take("video", *(names or ("video", "videos"))))
        videos = [item for item in (value if isinstance(value, list) else [value]) if not is_missing(item)]
        if len(videos) > 1:
            raise BadRow("about several videos")
        if videos and not isinstance(videos[0], str):
            raise BadRow("the video is no path", f"found {type(videos[0]).__name__}")
        return videos[0] if videos else None

    def note_unused(self, what: str) -> None:
        """Record that a part of a column is not used, such as the last answer of a dialogue."""
        self._noted.append(what)

    @property
    def unused(self) -> list[str]:
        """Columns with a value that nobody took, and the parts that were noted."""
        return [name for name, value in self._row.items() if name not in self.became and not is_missing(value)] + (
            self._noted
        )

    def _asked(self, role: str, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names to look under; only the first where a column was named for it."""
        names = names or (role,)
        return names[:1] if names[0] in self._columns else names

    def _column(self, name: str) -> str:
        if name in self._columns:
            return self._columns[name]
        return name if name in self._row else self._by_lower.get(name, name)

    def _mark(self, name: str, role: str) -> None:
        column = self._column(name)
        before = self.became.get(column)
        self.became[column] = role if before in (None, role) else f"{before}, {role}"


def is_missing(value: Any) -> bool:
    """Whether a table would leave the cell empty: None, NaN, blank text, an empty list or object.

    >>> [is_missing(value) for value in (None, float("nan"), " ", [], 0, "nan")]
    [True, True, True, True, False, False]
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return (isinstance(value, str) and not value.strip()) or (isinstance(value, (list, dict)) and not value)


def unpacked(value: Any) -> Any:
    """A list or object that stands as JSON text in the cell of a table, as what it is; anything else as it stands.

    >>> unpacked('["a.png", "b.png"]'), unpacked("[sic]")
    (['a.png', 'b.png'], '[sic]')
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, (list, dict)) else value
