"""A checkpoint, an image and questions typed by a person in; its answers out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from align.config import ModelSettings
from align.engines.base import SampleRequest, SampleResult, SamplingSettings
from align.engines.open import open_engine
from align.images import ImageStore


def chat(
    checkpoint: str, image: Path | None, questions: Iterable[str], *, temperature: float, max_new_tokens: int
) -> Iterator[str]:
    """Yield an answer to each question; earlier questions and answers stay in the dialogue."""
    store = ImageStore(image.parent if image else Path())
    if image is not None:
        store.size(image.name)
    engine = open_engine(checkpoint, ModelSettings(), open_image=store.open)
    messages: list[dict[str, Any]] = []
    for number, question in enumerate(questions):
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if image is not None and not messages:
            content.insert(0, {"type": "image"})
        messages.append({"role": "user", "content": content})
        images = (image.name,) if image is not None else ()
        results: list[SampleResult] = []
        request = SampleRequest(str(number), messages, images, num_samples=1, seed=number)
        engine.sample([request], SamplingSettings(temperature, max_new_tokens), results.append)
        answer = results[0].texts[0]
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        yield answer
