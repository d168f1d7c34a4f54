"""Every family in vLLM against what its authors' published code computed (tests/golden, README there)."""

import numpy as np
import pytest
from PIL import Image

from align.engines.vllm.chat_template import chat_template
from align.models.load import load_processor
from tests.models.goldens import GOLDENS, VL360
from tests.vllm.conftest import opened, with_images

# Not `vllm`: this folder would pass for it.
sampling_params = pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed")

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": 20}


@pytest.fixture(scope="module", params=GOLDENS, ids=lambda golden: golden.name)
def served(request):
    golden = request.param
    limit = {"image": 1 if golden is VL360 else 8}
    most = min(8192, golden.model.config.max_position_embeddings)
    with opened(golden.folder, limit_mm_per_prompt=limit, max_model_len=most) as llm:
        yield golden, llm


def names_of(golden):
    """Cases whose images reach a server as images: a frame of a video is known as one only in this process."""
    return [name for name, case in golden.cases.items() if "video" not in (case.get("kind"), case.get("preprocess"))]


def settings_of(golden, name):
    """Those of the processor; what a server cannot do, a black image for a question without one, is sent."""
    settings = golden.settings(golden.cases[name])
    return {key: value for key, value in settings.items() if key != "text_only_image"}


def images_of(golden, name):
    images = golden.ask(golden.cases[name])["images"]
    is_black = golden.settings(golden.cases[name]).get("text_only_image") == "black"
    if not images and is_black:
        return [Image.new("RGB", (3, 3))]
    return [image if isinstance(image, Image.Image) else Image.open(image) for image in images]


def answers(golden, llm, *names):
    conversations = [
        with_images(golden.ask(golden.cases[name])["conversation"], images_of(golden, name)) for name in names
    ]
    settings = settings_of(golden, names[0])
    return llm.chat(
        conversations,
        sampling_params.SamplingParams(**GREEDY),
        chat_template=chat_template(load_processor(golden.folder, **settings)),
        chat_template_content_format="openai",
        add_generation_prompt=conversations[0][-1]["role"] != "assistant",
        mm_processor_kwargs=settings,
        use_tqdm=False,
    )


def check(golden, name, answer):
    assert list(answer.prompt_token_ids) == golden.inputs(name)["input_ids"][0].tolist()
    assert list(answer.outputs[0].token_ids) == golden.cases[name]["greedy"]
    logits = golden.recorded(name, "last_logits").reshape(-1).astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    found = answer.outputs[0].logprobs[0]
    assert len(found) >= GREEDY["logprobs"]
    for token, entry in found.items():
        assert entry.logprob == pytest.approx(expected[token], abs=1e-4)


def test_every_case_equals_the_original_one_by_one(served):
    golden, llm = served
    for name in names_of(golden):
        (answer,) = answers(golden, llm, name)
        check(golden, name, answer)


def test_cases_that_are_asked_together_equal_the_original(served):
    golden, llm = served
    batches = [[name for name in names if name in names_of(golden)] for names in golden.batches(3000)]
    assert any(len(names) > 1 for names in batches)
    for names in filter(None, batches):
        for name, answer in zip(names, answers(golden, llm, *names), strict=True):
            check(golden, name, answer)
