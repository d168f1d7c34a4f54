"""Engines over tiny models, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from align.engines.base import SampleRequest, SampleResult, SamplingSettings
from align.engines.decoding import Branches, Decoded, Decoder, prefill
from align.engines.local import LocalEngine
from align.engines.sampling import Sampler
from align.prefix.attention import use_shared_prefix
from tests import tiny_models

TEXT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def onevision() -> tuple[Any, Any]:
    """A tiny LLaVA-OneVision and its processor. Tests must not change the weights."""
    return tiny_models.llava_onevision(), tiny_models.llava_onevision_processor()


def text_model(vocab_size: int = 261, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=258,
        pad_token_id=256,
        **changes,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def text_tokenizer() -> Any:
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.chat_template = TEXT_TEMPLATE
    return tokenizer


def question(number: int, *, num_images: int = 1, num_samples: int = 3) -> SampleRequest:
    """Question `number`: its text, image size and seed differ from those of all others."""
    images = [tiny_models.random_image(number * 7 + i, 30 + 11 * (number % 4), 30) for i in range(num_images)]
    text = {"type": "text", "text": "What is shown?" + " Look well." * (number % 3)}
    messages = [{"role": "user", "content": [{"type": "image"}] * num_images + [text]}]
    return SampleRequest(f"q{number}", messages, tuple(images), num_samples, seed=1000 + number)


def collect(engine: LocalEngine, requests: list[SampleRequest], settings: SamplingSettings) -> dict[str, SampleResult]:
    found: dict[str, SampleResult] = {}

    def keep(result: SampleResult) -> None:
        assert result.id not in found, "a question is answered once"
        found[result.id] = result

    engine.sample(requests, settings, keep)
    return found


def decode(
    model: Any,
    inputs: dict[str, Any],
    sampler: Sampler,
    *,
    num_samples: int,
    max_new_tokens: int,
    eos: list[int],
    on_finished: Callable[[Decoded], None] = lambda decoded: None,
) -> list[Decoded]:
    """Samples behind one batch of prompts; the sampler gets the prompts' numbers, in order."""
    use_shared_prefix(model)
    decoder = Decoder(model, sampler, max_new_tokens=max_new_tokens, eos=eos)
    prompts = prefill(model, inputs, decoder.cache, range(len(inputs["input_ids"])))
    found = dict.fromkeys(decoder.add(Branches.behind(prompts, [num_samples] * len(prompts.rows))))
    while decoder.num_branches:
        for decoded in decoder.step():
            found[decoded.ticket] = decoded
            on_finished(decoded)
    return list(found.values())
