"""The formats by name: how rows of one look, and what reads them. Rows are recognised by their shape, in this order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from typing import Any

from align.data.dialogues import MESSAGES, read_alpaca, read_dialogue, read_llava_preference, read_openai
from align.data.entry import BadRow, Entry
from align.data.fields import Fields, unpacked
from align.data.messages import Tags, unread_keys
from align.data.plain import COLUMNS, read_plain, read_spa_vl
from align.data.rlaif_v import read_rlaif_v
from align.data.sources import Table
from align.data.trl import read_trl
from align.data.vlfeedback import read_vlfeedback
from align.errors import UserError

# Rows that are looked at before the format is named, and how many of them must look like it.
PEEKED = 20
MIN_SHARE = 0.5


@dataclass(frozen=True)
class Format:
    """`about` says in a few words what it is; `matches` tells whether a row looks like it (None: only by its name)."""

    about: str
    read: Callable[[Fields], Entry]
    matches: Callable[[Fields], bool] | None = None


def _is_dialogue(row: Fields) -> bool:
    return any(isinstance(unpacked(row.get(name)), (list, dict)) for name in MESSAGES)


def _has_turns(row: Fields, *names: str) -> bool:
    return any(isinstance(unpacked(row.get(name)), (list, dict)) for name in names)


def _has_url_parts(row: Fields) -> bool:
    messages = unpacked(row.get("messages"))
    contents = (
        [turn.get("content") for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []
    )
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return any(part.get("type") == "image_url" for part in parts)


FORMATS: dict[str, Format] = {
    "llava-preference": Format(
        "LLaVA-RLHF's human preferences", read_llava_preference, lambda row: row.has("output_1", "output_2")
    ),
    "povid": Format("POVID", read_dialogue, lambda row: row.has("conversations", "rejected_conversations")),
    "vlfeedback": Format("VLFeedback's rated answers", read_vlfeedback, lambda row: row.has("completions", "prompt")),
    "openai": Format(
        "OpenAI's chat and preference files",
        read_openai,
        lambda row: row.has("input", "preferred_output") or _has_url_parts(row),
    ),
    "ms-swift": Format(
        "ms-swift's preferences",
        read_dialogue,
        lambda row: _is_dialogue(row) and (row.has("rejected_response") or row.has("rejected_messages")),
    ),
    "llama-factory": Format(
        "LLaMA-Factory's preferences (ShareGPT or messages)",
        read_dialogue,
        lambda row: _is_dialogue(row) and row.has("chosen", "rejected"),
    ),
    "trl": Format(
        "TRL's preferences, and pairs of this toolkit",
        read_trl,
        lambda row: _has_turns(row, "prompt", "chosen", "rejected"),
    ),
    "llava": Format(
        "LLaVA's conversations (ShareGPT)", read_dialogue, lambda row: _has_turns(row, "conversations", "conversation")
    ),
    "messages": Format("chat messages", read_dialogue, _is_dialogue),
    "alpaca": Format(
        "Alpaca's instructions, and ms-swift's queries",
        read_alpaca,
        lambda row: row.has("instruction") or row.has("query", "response"),
    ),
    "rlhf-v": Format("RLHF-V", read_rlaif_v, lambda row: row.has("ds_name", "text")),
    "rlaif-v": Format(
        "RLAIF-V", read_rlaif_v, lambda row: row.has("ds_name", "question", "chosen") and not _has_turns(row, "chosen")
    ),
    "spa-vl": Format("SPA-VL", read_spa_vl, lambda row: row.has("question", "class1")),
    "mmpr": Format("MMPR", read_plain, lambda row: row.has("question", "chosen", "answer_gt")),
    "mm-rlhf": Format("MM-RLHF", read_plain),
    "plain": Format(
        "a table with a column for the question, and questions of this toolkit",
        read_plain,
        lambda row: any(isinstance(row.get(name), str) for name in COLUMNS["question"]),
    ),
}


@dataclass(frozen=True)
class Reader:
    """What reads the rows of one table: the format's name, and the columns and tags that are called otherwise."""

    name: str
    columns: Mapping[str, str]
    tags: Tags | None = None

    def read(self, data: dict[str, Any]) -> tuple[Entry, Fields]:
        """What a row holds, and what became of its columns; BadRow where it cannot be used."""
        row = Fields(data, self.columns)
        read = FORMATS[self.name].read
        tagged = self.tags is not None and read is read_dialogue
        entry = read_dialogue(row, self.tags) if tagged else read(row)
        for column in list(row.became):
            for key in unread_keys(data[column], self.tags if tagged else None):
                row.note_unused(f"{column}: {key}")
        return entry, row


def reader_of(table: Table, name: str | None, columns: Mapping[str, str]) -> Reader:
    """The reader for a table: of the format that is named, of the one that its listing says, or of its rows' shape.

    `columns` are a person's names for the columns of a plain table.

    Raises:
        UserError: there is no such format or column, or no format has rows of this shape.
    """
    _check_names(name, columns)
    if columns:
        _check_columns(table, columns)
        return Reader("plain", columns)
    return Reader(name or table.format or _recognised(table, {}), table.columns, table.tags)


def peek(table: Table) -> list[dict[str, Any]]:
    """The first rows of a table that can be read, of the first `PEEKED`."""
    return [row.data for row in islice(table.rows(), PEEKED) if not isinstance(row.data, BadRow)]


def _recognised(table: Table, columns: Mapping[str, str]) -> str:
    rows = [Fields(data, columns) for data in peek(table)]
    for name, format_ in FORMATS.items():
        matches = format_.matches
        if matches is not None and rows and sum(map(matches, rows)) >= MIN_SHARE * len(rows):
            return name
    if not rows:
        # Nothing can be read; the conversion says why.
        return "plain"
    raise UserError(
        f"no known format has the columns {_named(rows)}",
        where=table.name,
        fix="name the columns with --columns question=...,images=..., or the format with --format",
    )


def _named(rows: Iterable[Fields]) -> str:
    return ", ".join(dict.fromkeys(str(name) for row in rows for name in row))


def _check_names(name: str | None, columns: Mapping[str, str]) -> None:
    if name is not None and name not in FORMATS:
        near = get_close_matches(name, FORMATS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"no format is called {name!r}{hint}", fix=f"there are: {', '.join(FORMATS)}")
    if columns and name not in (None, "plain"):
        raise UserError(f"the columns of {name} are known", fix="--columns is for --format plain")
    unknown = [role for role in columns if role not in COLUMNS]
    if unknown:
        raise UserError(f"no column is for {unknown[0]!r}", fix=f"columns are for: {', '.join(COLUMNS)}")


def _check_columns(table: Table, columns: Mapping[str, str]) -> None:
    rows = [Fields(data) for data in peek(table)]
    names = {name for row in rows for name in row}
    missing = [column for column in columns.values() if column not in names]
    if rows and missing:
        raise UserError(f"no column {missing[0]!r}", where=table.name, fix=f"the columns are {_named(rows)}")
