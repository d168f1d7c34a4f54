"""Small files in the real formats of public data sets; every text and picture is made here."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from align.data.importing import Imported, ImportOptions, import_data


def picture(number: int, width: int = 64, height: int = 48) -> Image.Image:
    """Shapes whose places and colours depend on the number, so that no two numbers look alike."""
    image = Image.new("RGB", (width, height), ((37 * number) % 256, (91 * number) % 256, 60))
    draw = ImageDraw.Draw(image)
    for step in range(4):
        x = (13 * number * (step + 1)) % width
        y = (29 * number * (step + 1)) % height
        draw.ellipse(
            (x - 9, y - 7, x + 9, y + 7), fill=((83 * number * step) % 256, 255 - 40 * step, (50 * step) % 256)
        )
    return image


def png(number: int, **size: int) -> bytes:
    buffer = io.BytesIO()
    picture(number, **size).save(buffer, "PNG")
    return buffer.getvalue()


def save_pictures(folder: Path, count: int, pattern: str = "{}.png") -> None:
    for number in range(count):
        path = folder / pattern.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_json(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def imported(source: Path, out: Path, format: str | None = None, **options: Any) -> Imported:
    return import_data(str(source), out, ImportOptions(format=format, **options))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def reply(line: dict[str, Any], side: str) -> str:
    """The text of a pair's chosen or rejected response."""
    return line[side][0]["content"][0]["text"]


def asked(line: dict[str, Any]) -> list[Any]:
    """A pair's prompt as (role, texts and "<image>" in order)."""
    return [
        (message["role"], [part.get("text", "<image>") for part in message["content"]]) for message in line["prompt"]
    ]
