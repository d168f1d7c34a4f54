"""What the benchmarks share: models that are small but not trivial, both sides timed in turn, ratios with their spread.

Both sides run in one process, alternating, so that a machine that slows down slows both. A ratio is the median over
rounds of (peer's seconds / our seconds) of the same round; its spread is the quartiles of these.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import tiny_models

PATCH_PX = 14
# Of a prompt's tokens, in the middle of what is usual for one image and a question.
IMAGE_SHARE = 0.85


@dataclass(frozen=True)
class Size:
    """A LLaVA-OneVision: Qwen2 language model and SigLIP tower, sizes in units."""

    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 4
    num_heads: int = 8
    num_key_value_heads: int = 2
    vocab_size: int = 8192
    vision_hidden_size: int = 96
    vision_layers: int = 4


def build_model(size: Size, prompt_tokens: int, seed: int = 0) -> tuple[Any, Any, int]:
    """A random model, its processor, and how many of `prompt_tokens` one square image takes.

    The tile is chosen so that an image takes about IMAGE_SHARE of the prompt: k x k patches, twice, and k line ends.
    """
    side = max(2, round((IMAGE_SHARE * prompt_tokens / 2) ** 0.5))
    tiles = {"tile_px": PATCH_PX * side, "tiles": 1}
    model = tiny_models.llava_onevision(seed, **vars(size), **tiles)
    return model, tiny_models.llava_onevision_processor(**tiles), 2 * side * side + side


def question_of(processor: Any, image_tokens: int, prompt_tokens: int) -> str:
    """A question whose prompt, with one image, has exactly `prompt_tokens` tokens (one a character)."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ""}]}]
    frame = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    taken = len(processor.tokenizer(frame, add_special_tokens=False)["input_ids"]) - 1 + image_tokens
    assert prompt_tokens > taken, f"{prompt_tokens} tokens do not hold an image of {image_tokens}"
    return "what is it? " * 1000 if prompt_tokens - taken > 12_000 else ("what is it? " * 1000)[: prompt_tokens - taken]


def alternate(sides: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every call, sides in turn, after `warmup` rounds that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(warmup + repeats):
        for name, run in sides.items():
            gc.collect()
            synchronize()
            started = time.perf_counter()
            run()
            synchronize()
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


@dataclass(frozen=True)
class Ratio:
    """The median over rounds of peer / ours, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, peer: list[float], ours: list[float]) -> Ratio:
        values = sorted(a / b for a, b in zip(peer, ours, strict=True))
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f}, {self.high:.2f}]"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors alive, by their storages, and remembers the most there were.

    What a kernel allocates inside of itself and frees again is not seen; on a GPU use the allocator's own peak.
    """

    def __init__(self, standing: Iterator[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()
        for tensor in standing:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@contextmanager
def peak_bytes(standing: Callable[[], Iterator[torch.Tensor]]) -> Iterator[list[int]]:
    """Put the most bytes alive within the context into the list that is given.

    `standing` names the tensors that are alive before it (weights, optimiser state); a GPU's allocator knows them.
    """
    result: list[int] = []
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield result
        result.append(torch.cuda.max_memory_allocated())
        return
    with LiveTensors(standing()) as counter:
        yield result
    result.append(counter.peak)


def describe_machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{device}, torch {torch.__version__}"
