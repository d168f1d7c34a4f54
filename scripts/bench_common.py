"""What the benchmark scripts share: a model to measure on, timing in turn, the ratio with its spread, the table.

The model is a LLaVA-OneVision with random weights: by default 256 wide and 4 layers deep, with a SigLIP tower of
112-pixel tiles, on which most of a prompt is image as in real use. Inputs are made directly; the processor is not
measured, as both sides run it once a question.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from live_tensors import peak_bytes
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig

TILE_PX = 112
PATCH_PX = 14
TILE_SIDE = TILE_PX // PATCH_PX
MAX_SIDE_TILES = 8
VOCAB_SIZE = 4096
IMAGE_TOKEN = VOCAB_SIZE - 1
HEAD_STD = 0.3


@dataclass(frozen=True)
class Size:
    """Sizes of the model's text part; `num_layers` and width of the tower go along."""

    width: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_key_value_heads: int = 2


def build_model(size: Size = Size(), *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A LLaVA-OneVision of this size with random weights, in evaluation mode."""
    torch.manual_seed(0)
    pinpoints = [[TILE_PX * h, TILE_PX * w] for h in range(1, MAX_SIDE_TILES + 1) for w in range(1, MAX_SIDE_TILES + 1)]
    text = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_key_value_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    vision = SiglipVisionConfig(
        hidden_size=size.width // 2,
        intermediate_size=2 * size.width,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        image_size=TILE_PX,
        patch_size=PATCH_PX,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        video_token_index=IMAGE_TOKEN - 1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{MAX_SIDE_TILES**2}",
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )
    model = LlavaOnevisionForConditionalGeneration(config).to(device, dtype).eval()
    with torch.no_grad():
        # Random heads predict nearly uniformly. So that nuclei are as small as a trained model's:
        model.lm_head.weight.normal_(std=HEAD_STD)
    return model


def image_grid(num_prompt_tokens: int) -> tuple[int, int, int]:
    """Rows and columns of tiles, and visual tokens, of the largest image that leaves 12 % of a prompt for text."""
    fitting = []
    for rows in range(1, MAX_SIDE_TILES + 1):
        for columns in (rows, rows + 1):
            # The whole image as one tile, then the tiles with a newline token behind every row of patches.
            tokens = TILE_SIDE**2 + rows * TILE_SIDE * (columns * TILE_SIDE + 1)
            if columns <= MAX_SIDE_TILES and tokens <= 0.88 * num_prompt_tokens:
                fitting.append((tokens, rows, columns))
    tokens, rows, columns = max(fitting)
    return rows, columns, tokens


def prompt_inputs(model: Any, num_prompt_tokens: int, *, batch_size: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of prompts of exactly this length, one image each and text."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns, num_image_tokens = image_grid(num_prompt_tokens)
    ids = torch.randint(1, VOCAB_SIZE - 2, (batch_size, num_prompt_tokens), generator=generator)
    ids[:, 4 : 4 + num_image_tokens] = IMAGE_TOKEN
    pixels = torch.randn(batch_size, 1 + rows * columns, 3, TILE_PX, TILE_PX, generator=generator)
    parameter = next(model.parameters())
    return {
        "input_ids": ids.to(parameter.device),
        "attention_mask": torch.ones_like(ids, device=parameter.device),
        "pixel_values": pixels.to(parameter),
        "image_sizes": torch.tensor([[TILE_PX * rows, TILE_PX * columns]] * batch_size, device=parameter.device),
    }


@dataclass
class Comparison:
    """Seconds of both sides, measured in turn; a ratio above 1 means that ours is faster."""

    label: dict[str, Any]
    ours_s: list[float] = field(default_factory=list)
    theirs_s: list[float] = field(default_factory=list)
    ours_mib: float | None = None
    theirs_mib: float | None = None

    @property
    def ratios(self) -> list[float]:
        return [theirs / ours for ours, theirs in zip(self.ours_s, self.theirs_s, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


# What seconds are: of the wall clock, or of this process's CPU time, which other users of the machine do not change.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]


def compare_in_turn(
    label: dict[str, Any],
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    repeats: int,
    standing: Sequence[Tensor] = (),
) -> Comparison:
    """Run both sides once to warm up, then `repeats` times in turn; with `standing` tensors, measure memory too."""
    result = Comparison(label)
    ours()
    theirs()
    for _ in range(repeats):
        result.ours_s.append(seconds(ours))
        result.theirs_s.append(seconds(theirs))
    if standing:
        result.ours_mib, result.theirs_mib = peak_mib(ours, standing), peak_mib(theirs, standing)
    return result


def seconds(run: Callable[[], Any]) -> float:
    _synchronise()
    start = clock()
    run()
    _synchronise()
    return clock() - start


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_mib(run: Callable[[], Any], standing: Sequence[Tensor]) -> float:
    """The most tensors alive during a run, in MiB, above those that stand there before: weights and inputs."""
    before = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in standing}.values())
    return (peak_bytes(run, standing) - before) / 2**20


def arguments(description: str) -> argparse.ArgumentParser:
    """The flags that all benchmarks take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="the target's shape only, three repeats")
    parser.add_argument("--repeats", type=int, default=5, help="how often both sides run")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: where others use the machine too")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    return parser


def start(options: argparse.Namespace) -> Any:
    """Set threads, say what is measured on what, and build the model."""
    global clock
    clock = CLOCKS[options.clock]
    torch.set_num_threads(options.threads)
    if options.quick:
        options.repeats = min(options.repeats, 3)
    on_gpu = options.device.startswith("cuda")
    where = torch.cuda.get_device_name() if on_gpu else f"{platform.processor() or platform.machine()} CPU"
    print(
        f"{where}, {options.threads} threads, {options.clock} seconds, torch {torch.__version__}, transformers"
        f" {transformers.__version__}"
    )
    return build_model(device=options.device, dtype=torch.bfloat16 if on_gpu else torch.float32)


def table(comparisons: Sequence[Comparison]) -> str:
    """A markdown table, one line a comparison."""
    names = list(comparisons[0].label)
    with_memory = comparisons[0].ours_mib is not None
    head = [*names, "ours s", "peer s", "ratio", "spread"] + (["ours MiB", "peer MiB"] if with_memory else [])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for c in comparisons:
        cells = [str(c.label[name]) for name in names]
        cells += [f"{statistics.median(c.ours_s):.3f}", f"{statistics.median(c.theirs_s):.3f}", f"{c.ratio:.2f}"]
        cells.append(f"{min(c.ratios):.2f}-{max(c.ratios):.2f}")
        if with_memory:
            cells += [f"{c.ours_mib:.0f}", f"{c.theirs_mib:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def finish(options: argparse.Namespace, comparisons: Sequence[Comparison], target: Comparison, **more: Any) -> None:
    """Print the table and the target's ratio, last of all; write the numbers where asked."""
    print(table(comparisons))
    if options.json is not None:
        found = {
            "threads": options.threads,
            "clock": options.clock,
            "device": options.device,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "comparisons": [c.record() for c in comparisons],
            **more,
        }
        options.json.write_text(json.dumps(found, indent=2))
    print(f"spread: {min(target.ratios):.2f} to {max(target.ratios):.2f} over {len(target.ratios)} repeats in turn")
    print(f"ratio: {target.ratio:.2f}")


def growth(comparisons: Sequence[Comparison], branches: str) -> dict[str, dict[str, float]]:
    """Least squares of the median seconds of both sides: `s = a + b * P + c * N + d * N * P`.

    P is a label's prompt tokens in thousands, N its number of `branches` (a name in the label). A side that encodes
    the prompt once has its growth with the prompt in b, one that encodes it for every branch in d.
    """
    features = torch.tensor(
        [[1.0, p, k, p * k] for p, k in ((c.label["prompt"] / 1000, c.label[branches]) for c in comparisons)],
        dtype=torch.float64,
    )
    found = {}
    for side in ("ours", "theirs"):
        seconds_ = [statistics.median(getattr(c, f"{side}_s")) for c in comparisons]
        values = torch.tensor(seconds_, dtype=torch.float64)[:, None]
        fit = torch.linalg.lstsq(features, values).solution[:, 0]
        found[side] = dict(
            zip(("fixed", "per 1000 prompt tokens", "per branch", "per both"), fit.tolist(), strict=True)
        )
    return found


def print_growth(found: dict[str, dict[str, float]]) -> None:
    for side, terms in found.items():
        print(f"{side}: seconds = " + " + ".join(f"{value:.3f} ({name})" for name, value in terms.items()))
