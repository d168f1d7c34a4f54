"""What is asked of vLLM in this process. Tests that need it are skipped where it is not installed."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# One process, which a debugger sees into; and little memory for a cache of tiny models.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@contextmanager
def opened(folder: Path, **settings: Any) -> Iterator[Any]:
    """A vLLM `LLM` in float32 without compilation. Chunked prefill is off: with seeds it ends vllm-cpu's engine."""
    from vllm import LLM

    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        enable_chunked_prefill=False,
        max_num_seqs=8,
        **{"max_model_len": 8192, "max_num_batched_tokens": 16384, **settings},
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def with_images(conversation: list[dict[str, Any]], images: list[Any]) -> list[dict[str, Any]]:
    """Messages as vLLM takes them, the images in front of the first user turn's text."""
    messages = [dict(message) for message in conversation]
    if images:
        first = next(message for message in messages if message["role"] == "user")
        parts = [{"type": "image_pil", "image_pil": image} for image in images]
        first["content"] = [*parts, {"type": "text", "text": first["content"]}]
    return messages
