"""Tokens per second of a Valley-Eagle with random weights, drawn by the engine of this process or by vLLM.

python scripts/first_gpu_decode.py decode --size valley-eagle-7b --json decode.json
python scripts/first_gpu_decode.py vllm --size valley-eagle-7b --json vllm.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.config import build_config
from align.engines.base import Engine, SampleRequest, SampleResult, SamplingSettings
from align.engines.local import LocalEngine
from scripts.valley_size import GOLDEN, SIZES, build_valley
from tests.tiny_models import random_image

QUESTION = "Describe the picture in detail, and say what is unusual about it."
WEIGHTS = ("model.safetensors", "config.json", "generation_config.json")


def requests(options: argparse.Namespace) -> list[SampleRequest]:
    """Questions about photos of 800 x 600, each with its own picture."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    return [
        SampleRequest(f"q{index}", messages, (random_image(index, 800, 600),), options.samples, index)
        for index in range(options.questions)
    ]


def measure(engine: Engine, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of responses of up to `new_tokens`; a first, short question is not counted."""
    asked, found = requests(options), []
    short = SamplingSettings(temperature=1.0, top_p=0.9, max_new_tokens=2)
    settings = SamplingSettings(temperature=1.0, top_p=0.9, max_new_tokens=options.new_tokens)
    engine.sample(asked[:1], short, lambda _: None)

    def keep(result: SampleResult) -> None:
        found.append(sum(result.num_tokens))

    start = time.perf_counter()
    engine.sample(asked, settings, keep)
    seconds = time.perf_counter() - start
    return {
        "tokens_per_s": sum(found) / seconds,
        "responses_per_s": len(found) * options.samples / seconds,
        "questions": options.questions,
        "samples": options.samples,
        "notes": engine.notes,
    }


def decode(options: argparse.Namespace) -> dict[str, Any]:
    """The engine of this process."""
    dtype = torch.bfloat16 if options.device != "cpu" else torch.float32
    model, processor = build_valley(options.size, options.device, dtype)
    engine = LocalEngine(model.eval(), processor)
    found = measure(engine, options)
    if options.device != "cpu":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def vllm(options: argparse.Namespace) -> dict[str, Any]:
    """vLLM on the same model, written to a folder that it can serve."""
    from align.engines.open import open_hosted
    from align.engines.vllm import hosting
    from align.engines.vllm.command import vllm_version

    dtype = torch.bfloat16 if options.device != "cpu" else torch.float32
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "policy"
        model, _ = build_valley(options.size, options.device, dtype)
        model.save_pretrained(folder)
        del model
        if options.device != "cpu":
            torch.cuda.empty_cache()
        for path in GOLDEN.iterdir():
            if path.name not in WEIGHTS and path.suffix in (".json", ".jinja", ".txt", ".model"):
                shutil.copyfile(path, folder / path.name)
        if vllm_version() is None or options.device == "cpu":
            return {"left_out": "vLLM is not installed" if vllm_version() is None else "no GPU is there for vLLM"}
        config = build_config({"policy": str(folder), "questions": "none.jsonl"}, base=Path(name))
        try:
            engine, _ = open_hosted(
                config,
                str(folder),
                {},
                engine="vllm",
                open_image=lambda image: image,
                logs=options.json.with_suffix(""),
            )
            assert engine is not None
            return measure(engine, options) | {"version": vllm_version()}
        finally:
            hosting.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("decode", "vllm"))
    parser.add_argument("--size", choices=SIZES, default=SIZES[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--samples", type=int, default=5, help="responses per question")
    parser.add_argument("--new-tokens", type=int, default=128, help="most tokens of a response")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    found = (decode if options.what == "decode" else vllm)(options)
    options.json.write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")
    print(json.dumps(found, default=str))


if __name__ == "__main__":
    main()
