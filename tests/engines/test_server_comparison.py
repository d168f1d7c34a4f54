"""What a server says is compared with the checkpoint: prompts by their tokens, weights by their folder,
room by its length."""

import shutil

import pytest

from align.config import Server, ServerSettings
from align.engines.base import SampleRequest, SamplingSettings
from align.engines.open import open_servers
from align.errors import UserError
from align.models.load import load_processor
from reward.judge_model import BranchedPrompt
from tests.engines.conftest import collect
from tests.engines.stub_server import MODEL, StubServer, completion, is_probe
from tests.patience import PATIENCE_S
from tests.tiny_models import random_image, save_llava_onevision

FAST = ServerSettings(backoff_s=0.01, cooldown_s=0.05, timeout_s=PATIENCE_S, concurrency=4)
IMAGE = {"type": "image"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_llava_onevision(tmp_path_factory.mktemp("model") / "policy")


@pytest.fixture(scope="module")
def tokens_of(checkpoint):
    """The tokens of a question with so many images, as the checkpoint's own processor makes them."""
    processor = load_processor(checkpoint)

    def tokens(num_images):
        chat = [{"role": "user", "content": [*([IMAGE] * num_images), {"type": "text", "text": "What?"}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        images = {"images": [pictures(num_images)]} if num_images else {}
        return processor(text=[text], **images)["input_ids"][0]

    return tokens


@pytest.fixture
def serve():
    started = []

    def start(count=None, ids=None, **how):
        """Answers with so many prompt tokens per number of images, or with their ids."""

        def answer(body):
            content = body["messages"][-1]["content"]
            num_images = sum(part["type"] == "image_url" for part in content) if isinstance(content, list) else 0
            found = completion(["yes"] * body.get("n", 1))
            if not is_probe(body):
                found["usage"] = {"prompt_tokens": count(num_images) if count else 7, "completion_tokens": 3}
                found |= {"prompt_token_ids": ids(num_images)} if ids else {}
            return found

        started.append(StubServer(answer=answer, **how))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def pictures(count):
    return [random_image(index, 40, 30) for index in range(count)]


def engine_on(server, checkpoint, **changes):
    settings = FAST.model_copy(update=changes)
    named = [Server(url=server.url, model=MODEL)]
    return open_servers(named, str(checkpoint), settings, open_image=lambda image: image)


def ask(engine, *counts, max_new_tokens=8):
    requests = [
        SampleRequest(
            str(number),
            [{"role": "user", "content": [*([IMAGE] * count), {"type": "text", "text": "What?"}]}],
            tuple(pictures(count)),
            1,
            0,
        )
        for number, count in enumerate(counts)
    ]
    return collect(engine, requests, SamplingSettings(temperature=1.0, max_new_tokens=max_new_tokens))


def test_prompts_of_every_kind_are_compared_and_named_in_the_notes(serve, checkpoint, tokens_of):
    engine = engine_on(serve(lambda images: len(tokens_of(images))), checkpoint)
    ask(engine, 0, 1, 1, 1, 2)
    assert engine.notes["prompts"] == (
        "equal to the checkpoint's own processor: 1 with no image, 2 with one image, 1 with several images"
    )


def test_a_server_that_reads_several_images_otherwise_is_refused(serve, checkpoint, tokens_of):
    wrong = serve(lambda images: len(tokens_of(images)) + 30 * (images > 1))
    engine = engine_on(wrong, checkpoint)
    ask(engine, 0, 1)
    count = len(tokens_of(2))
    with pytest.raises(UserError, match=rf"several images as {count + 30} tokens.* makes {count}") as refusal:
        ask(engine, 2)
    assert wrong.url in str(refusal.value)
    assert ask(engine_on(wrong, checkpoint, compare_prompts=False), 2)


def test_equally_many_other_tokens_are_seen_where_the_server_returns_them(serve, checkpoint, tokens_of):
    def other(images):
        ids = list(tokens_of(images))
        return [*ids[:-1], ids[-1] + 1]

    right, wrong = serve(ids=lambda images: list(tokens_of(images))), serve(ids=other)
    assert ask(engine_on(right, checkpoint), 1)
    with pytest.raises(UserError, match=f"from the {len(tokens_of(1))}th on"):
        ask(engine_on(wrong, checkpoint), 1)


def test_texts_are_those_of_the_checkpoints_own_tokenizer_where_the_server_returns_tokens(checkpoint):
    """vLLM writes an answer behind its prompt: with the space that a tokenizer puts in front of every word."""
    tokenizer = load_processor(checkpoint).tokenizer
    ids = [*tokenizer("a red cup", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    server = StubServer(answer=lambda body: completion([" a red cup"], token_ids=ids))
    engine = engine_on(server, checkpoint, compare_prompts=False)
    assert ask(engine, 1)["0"].texts == ("a red cup",)
    assert engine.generate([BranchedPrompt((), None, "Is it ", (("red",),), "?", ())], max_new_tokens=4) == [
        ["a red cup"]
    ]
    elsewhere = open_servers([Server(url=server.url, model=MODEL)], None, FAST, open_image=lambda image: image)
    assert ask(elsewhere, 1)["0"].texts == (" a red cup",)
    server.stop()


def test_a_critics_prompts_are_compared_too(serve, checkpoint):
    engine = engine_on(serve(lambda images: 3), checkpoint)
    prompt = BranchedPrompt(tuple(pictures(1)), None, "Is it ", (("red",),), "?", ("yes", "no"))
    with pytest.raises(UserError, match="one image as 3 tokens"):
        engine.generate([prompt], max_new_tokens=4)
    with pytest.raises(UserError, match="one image as 3 tokens"):
        engine_on(serve(lambda images: 3), checkpoint).log_probs([prompt])


def test_a_text_that_spells_a_special_token_is_not_compared(serve, checkpoint):
    engine = engine_on(serve(lambda images: 3), checkpoint)
    prompt = BranchedPrompt((), None, "Is <image> ", (("red",),), "?", ())
    assert engine.generate([prompt], max_new_tokens=4) == [["yes"]]
    assert engine.notes["prompts"] == "not compared"


def test_other_weights_under_the_right_name_are_refused(serve, checkpoint, tmp_path):
    same = shutil.copytree(checkpoint, tmp_path / "same")
    other = save_llava_onevision(tmp_path / "other", seed=1)
    engine = engine_on(serve(card={"root": str(same)}), checkpoint)
    assert "checkpoint's contents" in engine.about["weights"]
    with pytest.raises(UserError, match="other weights under this name"):
        engine_on(serve(card={"root": str(other)}), checkpoint)
    engine = engine_on(serve(card={"root": "/nowhere"}), checkpoint)
    assert engine.about["weights"].startswith("the name alone")


def test_a_server_without_room_for_prompt_and_answer_is_refused(serve, checkpoint, tokens_of):
    read = len(tokens_of(1))
    fits = serve(lambda images: read, card={"max_model_len": read + 8})
    assert ask(engine_on(fits, checkpoint), 1)
    with pytest.raises(UserError, match=rf"--max-model-len {read + 9} or more"):
        ask(engine_on(fits, checkpoint), 1, max_new_tokens=9)


def test_the_models_own_context_ends_an_answer_on_a_server_as_it_does_here(serve, checkpoint, tokens_of):
    from align.models.load import read_config

    context = read_config(checkpoint)["text_config"]["max_position_embeddings"]
    server = serve(lambda images: len(tokens_of(images)), card={"max_model_len": context})
    assert ask(engine_on(server, checkpoint), 1, max_new_tokens=context)


def test_a_path_is_a_models_name_however_it_is_written(serve, checkpoint):
    server = serve(models=(str(checkpoint),))
    named = [Server(url=server.url, model=f"{checkpoint}/")]
    engine = open_servers(named, None, FAST, open_image=lambda image: image)
    assert [endpoint.model for endpoint in engine.fleet.endpoints] == [str(checkpoint)]
