"""A checkpoint's config.json in, the limits that its model has out."""

from __future__ import annotations

from typing import Any


def position_limit(config: dict[str, Any]) -> int | None:
    """How many positions the language model has, from config.json; None where the file does not say.

    >>> position_limit({"text_config": {"max_position_embeddings": 4096}, "max_position_embeddings": 77})
    4096
    """
    for section in (config.get("text_config"), config.get("llm_config"), config):
        if isinstance(section, dict) and isinstance(section.get("max_position_embeddings"), int):
            return section["max_position_embeddings"]
    return None
