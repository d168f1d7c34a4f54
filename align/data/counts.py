"""What an import keeps count of: rows, what was left out and why, and what became of every column."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.data.entry import BadRow
from align.data.fields import Fields
from align.log import log

SHOWN = 20
KEPT_FAULTS = 1000
# What a reader finds and a record of the other kind has no place for.
NOT_IN = {
    "questions": {"chosen", "rejected", "margin", "rewards", "responses"},
    "pairs": {"answer", "answer_kind", "absent_objects"},
}


@dataclass
class ImportCounts:
    """Counts of an import, the first `KEPT_FAULTS` rows that were left out, and the columns with what they became.

    rows: that were looked at, each as often as it counts. columns: by column and role, in how many rows. unused: by
    column, in how many rows it held something that nothing was made of. treated: images by what is done to them when
    they are opened (turned upright, scaled to 8 bits, laid on white).
    """

    make: str = "questions"
    formats: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    written: int = 0
    without_image: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    columns: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    unused: Counter[str] = field(default_factory=Counter)
    treated: Counter[str] = field(default_factory=Counter)

    def drop(self, where: str, problem: BadRow, copies: int = 1) -> None:
        """Count a row that is left out, and say so of the first."""
        before = self.dropped.total()
        self.dropped[problem.reason] += copies
        # Half a character is reported as it is escaped: no log and no file could hold it.
        where, detail = (text.encode("utf-8", "backslashreplace").decode() for text in (where, str(problem)))
        if before < SHOWN:
            log.warning("%s: left out: %s", where, detail)
        if len(self.faults) < KEPT_FAULTS:
            self.faults.append(f"{where}: {detail}")

    def note_columns(self, row: Fields) -> None:
        """Count what became of the columns of one row."""
        for column, role in row.became.items():
            kept = [part for part in role.split(", ") if part not in NOT_IN[self.make]]
            if kept:
                self.columns[column][", ".join(kept)] += 1
            else:
                self.unused[column] += 1
        self.unused.update(row.unused)

    def as_dict(self) -> dict[str, Any]:
        """As `import.json` holds it."""
        return {
            "makes": self.make,
            "formats": self.formats,
            "rows": self.rows,
            "written": self.written,
            "without_image": self.without_image,
            "dropped": dict(self.dropped),
            "columns": {name: dict(roles) for name, roles in self.columns.items()},
            "unused": dict(self.unused),
            "treated_images": dict(self.treated),
            "faults": self.faults,
        }

    def write(self, path: Path) -> None:
        """Write `import.json`. Faults are escaped already; a column's name may hold half a character too."""
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8", errors="backslashreplace")

    def text(self) -> str:
        """What a person should know: how the rows were read, what the columns became, what is not used or left out."""
        names = Counter(self.formats.values())
        lines = [f"read as {' and '.join(names)}" + (f" ({len(self.formats)} files)" if len(self.formats) > 1 else "")]
        columns = [f"{name} -> {' or '.join(roles)}" for name, roles in self.columns.items()]
        lines += [f"columns: {'; '.join(columns)}"] if columns else []
        lines += [f"not used: {_listed(self.unused.items())}"] if self.unused else []
        if self.without_image:
            lines.append(self._images())
        if self.treated:
            lines.append(f"images, whenever they are opened: {_listed(self.treated.most_common())}")
        lines += [f"left out: {_listed(self.dropped.most_common())}; see import.json"] if self.dropped else []
        return "\n".join(lines).encode("utf-8", "backslashreplace").decode()

    def _images(self) -> str:
        if self.without_image < self.written:
            return f"{self.without_image} of {self.written} {self.make} have no image"
        return f"WARNING: none of the {self.make} has an image; name their column with --columns images=..."


def _listed(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts)
