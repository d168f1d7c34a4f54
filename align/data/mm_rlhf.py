"""MM-RLHF: human-ranked pairs in JSON lines (`dpo_pairs.jsonl`), with images and videos as paths.

``{"prompt", "chosen", "rejected", "image" | "video", ...}``, paths inside the folder into which the zips were unpacked:
card of yifanzhang114/MM-RLHF, and the authors' converter (scripts/convert_to_swift.py).
"""

from __future__ import annotations

from typing import Any

from align.data.entry import BadRow, Entry, Preference, images_in, text_in


def read_mm_rlhf(row: dict[str, Any]) -> Entry:
    """One pair; rows about videos are not taken."""
    if row.get("video"):
        raise BadRow("about a video")
    preference = Preference(text_in(row, "chosen"), text_in(row, "rejected"))
    name = None if row.get("id") is None else str(row["id"])
    return Entry(text_in(row, "prompt", "question"), images_in(row, "image"), name, preferences=[preference])
