"""vLLM in this process, and a server that all tests ask. Tests that need it are skipped where it is not installed."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE_S

# One process, which a debugger sees into; and little memory for a cache of tiny models.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


WRITES = {"a": 3.0, "b": 3.0} | dict.fromkeys("0123456789", 1.5)


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint in `model` that writes letters and digits."""
    from tests.vllm.byte_eagle import save_byte_eagle

    folder = tmp_path_factory.mktemp("judges")
    save_byte_eagle(folder / "model", writes=WRITES)
    return folder


@pytest.fixture(scope="session")
def engines(judge_folder: Path) -> Iterator[tuple[Any, Any]]:
    """The local engine, and one on a server that is started once for all tests."""
    from align.config import ModelSettings, ServerSettings, VllmSettings
    from align.engines.open import open_engine, open_servers
    from align.engines.server.replicas import LOCAL_HOST, Launch, Replicas
    from align.engines.vllm.command import Served, serve_arguments
    from align.engines.vllm.hosting import PROGRAM
    from tests.vllm.byte_eagle import VOCABULARY

    checkpoint = str(judge_folder / "model")
    settings = VllmSettings(max_model_len=2048, arguments=["--enforce-eager", "--distributed-executor-backend", "uni"])
    served = Served(checkpoint, "judge", "float32", {}, top_logprobs=VOCABULARY)
    arguments = serve_arguments(served, settings, judge_folder / "servers")

    def command(port: int) -> list[str]:
        return [sys.executable, *PROGRAM, *arguments, "--host", LOCAL_HOST, "--port", str(port)]

    replicas = Replicas(
        [Launch(command, {})],
        model="judge",
        logs=judge_folder / "servers" / "judge",
        max_restarts=0,
        start_timeout_s=PATIENCE_S,
    )
    with replicas:
        yield (
            open_engine(checkpoint, ModelSettings(), open_image=_opened),
            open_servers(replicas.servers, checkpoint, ServerSettings(top_logprobs=VOCABULARY), open_image=_opened),
        )


def _opened(image: Any) -> Any:
    return image


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
