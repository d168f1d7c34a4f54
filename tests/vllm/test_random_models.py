"""Valley-Eagle with heads of 64, which nothing has to be done for: vLLM's greedy responses are the local engine's."""

import itertools
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from align.engines.base import SampleRequest, SamplingSettings
from align.engines.local import LocalEngine
from align.engines.vllm.chat_template import chat_template
from align.models.load import load_model, load_processor
from tests.models import tiny_valley
from tests.vllm.conftest import opened, with_images

# Not `vllm`: this folder would pass for it.
sampling_params = pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed")
LoRARequest = pytest.importorskip("vllm.lora.request", reason="vLLM is not installed").LoRARequest

WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96}
EAGLE = {**tiny_valley.QWEN2VL, "hidden_size": 128}
KINDS = {
    "both encoders": {"eagle_vision_config": EAGLE},
    "one encoder": {"eagle": False},
    "convolution": {"mm_projector_type": "conv_adapter", "eagle_vision_config": EAGLE},
    "pixel shuffle": {
        "mm_projector_type": "mlp_pixel_shuffle",
        "pixelshuffle_downsample_ratio": 2,
        "eagle_vision_config": EAGLE,
    },
}
SIZES = ((150, 90), (90, 200), (112, 112), (300, 260))
QUESTIONS = ("what is this", "a cat one two", "red blue")
LONGEST = 8


def picture(width, height, seed):
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


def asked():
    """Questions with no, one and two images; the same image alone and beside another."""
    pictures = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    found = [(words, (one,)) for one in pictures for words in QUESTIONS]
    found += [(words, (one, other)) for one, other in itertools.pairwise(pictures) for words in QUESTIONS]
    return [*found, *((words, ()) for words in QUESTIONS)]


def local_responses(folder, questions):
    engine = LocalEngine(load_model(folder), load_processor(folder), open_image=lambda image: image)
    requests = [
        SampleRequest(
            id=str(index),
            messages=[
                {"role": "user", "content": [{"type": "image"} for _ in images] + [{"type": "text", "text": words}]}
            ],
            images=images,
            num_samples=1,
            seed=0,
        )
        for index, (words, images) in enumerate(questions)
    ]
    found = {}
    engine.sample(
        requests, SamplingSettings(temperature=0.0, max_new_tokens=LONGEST), lambda one: found.update({one.id: one})
    )
    return [list(found[request.id].token_ids[0]) for request in requests]


def served_responses(llm, folder, questions, **request):
    answers = llm.chat(
        [with_images([{"role": "user", "content": words}], list(images)) for words, images in questions],
        sampling_params.SamplingParams(temperature=0, max_tokens=LONGEST),
        chat_template=chat_template(load_processor(folder)),
        chat_template_content_format="openai",
        use_tqdm=False,
        **request,
    )
    return [list(answer.outputs[0].token_ids) for answer in answers]


def engine(folder, **settings):
    return opened(folder, max_model_len=2048, max_num_batched_tokens=4096, limit_mm_per_prompt={"image": 2}, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_responses_equal_the_local_engine(kind, tmp_path):
    folder = tiny_valley.folder(tmp_path / "policy", **{**WIDE, **KINDS[kind]})
    questions = asked()
    assert len(questions) >= 24
    with engine(folder) as llm:
        found = served_responses(llm, folder, questions)
    assert found == local_responses(folder, questions)
    assert len({tuple(tokens) for tokens in found}) > len(QUESTIONS), "images should matter to the answers"


def test_two_ranks_of_tensor_parallelism_give_the_local_engines_responses(tmp_path):
    folder = tiny_valley.folder(tmp_path / "policy", **WIDE, eagle_vision_config=EAGLE)
    with engine(folder, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        found = served_responses(llm, folder, asked())
    assert found == local_responses(folder, asked())


def test_an_adapter_gives_the_responses_of_the_model_that_it_is_merged_into(tmp_path):
    folder = tiny_valley.folder(tmp_path / "policy", **WIDE, eagle_vision_config=EAGLE)
    merged = shutil.copytree(folder, tmp_path / "merged")
    torch.manual_seed(0)
    layers = r"model\.layers\..*\.(q_proj|v_proj|o_proj|down_proj)"
    settings = LoraConfig(r=8, lora_alpha=64, target_modules=layers, init_lora_weights=False)
    adapted = get_peft_model(load_model(folder), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(merged)
    with engine(folder, enable_lora=True, max_lora_rank=8) as llm:
        base = served_responses(llm, folder, asked())
        adapter = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
        found = served_responses(llm, folder, asked(), lora_request=adapter)
    assert base == local_responses(folder, asked())
    assert found == local_responses(merged, asked())
    assert found != base
