"""Samples, every kind of critic, conversations and given responses on one vLLM server: what the local engine says."""

import math

import pytest

from align.config import build_config
from align.engines.base import GivenResponses, SampleRequest, SamplingSettings
from align.errors import UserError
from align.loop import run_stage
from reward.critics import Item, make_critic
from tests.stage_runs import write_lines
from tests.tiny_models import random_image

pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed")

PROMPTS = {
    "pairwise": "kind: pairwise\noptions: {first: a, second: b}\n---\n[{question}] a: [{first}] b: [{second}] a or b?\n",
    "written": "kind: pairwise\noptions: {first: '9', second: '1'}\n---\n[{question}] 9: [{first}] 1: [{second}] 9 or 1?\n",
    "pointwise": "kind: pointwise\nscale: [0, 99]\noptions: {OPTIONS}\n---\n[{question}] [{response}] 0 to 99?\n".replace(
        "OPTIONS", ", ".join(f"{n}: '{n}'" for n in range(10))
    ),
    "claims": "kind: claims\noptions: {correct: a, wrong: b}\n---\n[{question}] [{claim}] a or b?\n",
    "split": "kind: split\n---\n[{question}] [{response}] a fact a line\n",
}


@pytest.fixture(scope="module")
def folder(judge_folder):
    """A checkpoint that writes letters and digits, and prompts that ask for them."""
    for name, text in PROMPTS.items():
        (judge_folder / f"{name}.md").write_text("---\n" + text)
    return judge_folder


def test_a_stage_samples_what_it_does_on_the_local_engine(engines, folder, tmp_path):
    """Greedy by `top_k: 1`, since a stage refuses temperature 0; questions with no, one and two images."""
    (tmp_path / "images").mkdir()
    names = [f"images/{index}.png" for index in range(2)]
    for index, name in enumerate(names):
        random_image(index, 120 + 20 * index, 90).save(tmp_path / name)
    write_lines(
        tmp_path / "questions.jsonl",
        [{"id": f"q{count}", "question": f"What are {count}?", "images": names[:count]} for count in range(3)],
    )
    (endpoint,) = engines[1].fleet.endpoints
    found = []
    for name, where in (("served", {"servers": [{"url": endpoint.url, "model": endpoint.model}]}), ("here", {})):
        sample = {"num_responses": 2, "max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "top_k": 1} | where
        settings = {"name": name, "policy": str(folder / "model"), "questions": "questions.jsonl", "sample": sample}
        result = run_stage(build_config(settings, base=tmp_path), "sample", 1)
        found.append((tmp_path / f"runs/{name}/round-1/samples.jsonl").read_bytes())
        if name == "served":
            kinds = "1 with no image, 1 with one image, 1 with several images"
            assert result.notes["prompts"] == f"equal to the checkpoint's own processor: {kinds}"
    assert found[0] == found[1]


def item(number, num_images, *responses):
    images = tuple(random_image(10 * number + index, 100 + 30 * index, 80) for index in range(num_images))
    return Item(id=f"i{number}", question=f"What is {number}?", images=images, responses=responses)


ITEMS = [
    item(0, 1, "A cup. It is red.", "Two cups. They stand there.", "No cup."),
    item(1, 2, "The first is older.", "Both are old. Very."),
    item(2, 0, "Four.", "It is five. Or six."),
]
CRITICS = {
    "pairwise": ("pairwise", {"soft": True}),
    "pairwise with rationales": ("pairwise", {"read": "text", "max_new_tokens": 1}),
    "pointwise": ("pointwise", {}),
    "pointwise, written": ("pointwise", {"read": "text", "max_new_tokens": 1}),
    "claims": ("claims", {"score": "soft"}),
    "claims, split by the model": ("claims", {"split": "ask", "score": "soft", "max_new_tokens": 8}),
}


def options_of(name, folder):
    kind, options = CRITICS[name]
    prompts = {"prompt": str(folder / f"{kind}.md")}
    prompts = {"prompt": str(folder / "written.md")} if kind == "pairwise" and options.get("read") else prompts
    return {"kind": kind, **options, **prompts} | (
        {"split_prompt": str(folder / "split.md")} if kind == "claims" else {}
    )


def judged(engine, options):
    rest = {key: value for key, value in options.items() if key != "kind"}
    return [judgement.model_dump() for judgement in make_critic(options["kind"], rest, judge_model=engine).judge(ITEMS)]


def assert_close(found, expected, where="judgement"):
    """Equal but for numbers, which are sums of differences of at most 1e-4."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_close(found[index], value, f"{where}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-3), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("name", CRITICS)
def test_a_critic_judges_as_on_the_local_engine(name, engines, folder):
    local, served = engines
    options = options_of(name, folder)
    expected = judged(local, options)
    assert any(reward is not None for judgement in expected for reward in judgement["rewards"])
    assert_close(judged(served, options), expected)
    if options.get("read") == "text" and options["kind"] == "pairwise":
        assert any(verdict["rationale"] for judgement in expected for verdict in judgement["verdicts"])


def test_a_panel_judges_as_on_the_local_engine(engines, folder):
    members = {name.replace(" ", "-"): options_of(name, folder) for name in ("pairwise", "pointwise", "claims")}
    options = {"kind": "panel", "critics": members}
    expected = judged(engines[0], options)
    assert any(reward is not None for judgement in expected for reward in judgement["rewards"])
    assert_close(judged(engines[1], options), expected)


def conversation():
    """Two turns with an image each, as a chat sends them."""
    image = {"type": "image"}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
        {"role": "user", "content": [image, {"type": "text", "text": "And this?"}]},
    ]
    return messages, tuple(random_image(index, 90, 120) for index in range(2))


def test_a_conversation_is_answered_as_on_the_local_engine(engines):
    messages, images = conversation()
    found = []
    for engine in engines:
        answers = []
        request = SampleRequest("chat", messages, images, 1, seed=0)
        engine.sample([request], SamplingSettings(temperature=0.0, max_new_tokens=12), answers.append)
        found.append((answers[0].texts, answers[0].token_ids))
    assert found[0] == found[1]
    assert len(found[0][1][0]) == 12


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_given_responses_are_weighed_as_on_the_local_engine(engines, temperature):
    """The last one is half a character, which no text can bring back."""
    local, served = engines
    messages, images = [{"role": "user", "content": [{"type": "image"}]}], (random_image(0, 60, 60),)
    tokenizer = local.prompter.tokenizer
    texts = (tokenizer.encode(text, add_special_tokens=False) for text in ("a1 b", "A cup.", "7", "\u00e9"))
    token_ids = [(*tokens, tokenizer.eos_token_id) for tokens in texts]
    token_ids[-1] = token_ids[-1][:1]
    before = served.counts["responses not weighed"]
    rows = []
    for engine in (local, served):
        found = {}
        given = [GivenResponses("chat", messages, images, tuple(token_ids))]
        engine.loglikelihood(given, found.__setitem__, temperature=temperature)
        rows.append(found["chat"])
    for ours, theirs in list(zip(*rows, strict=True))[:-1]:
        assert theirs == pytest.approx(ours, abs=1e-4)
    assert math.isnan(rows[1][-1][0])
    assert served.counts["responses not weighed"] == before + 1


def test_a_question_that_vllm_refuses_is_named_with_its_words(engines):
    """The text spells what stands for an image: the plugin refuses to guess."""
    image = random_image(0, 90, 120)
    content = [{"type": "image"}, {"type": "text", "text": "What is <|image_pad|>?"}]
    request = SampleRequest("odd", [{"role": "user", "content": content}], (image,), 1, seed=0)
    with pytest.raises(UserError, match=r"odd: 4\d\d: .*found 2 places"):
        engines[1].sample([request], SamplingSettings(temperature=0.0, max_new_tokens=4), lambda result: None)
