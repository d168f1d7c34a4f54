"""Valley 1 folders as they were published: a tokenizer.model, and tokens that were added beside it."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece
from PIL import Image

from align.errors import UserError
from align.models.load import load_model, load_processor
from align.models.save import save_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "valley_v1_tiny"
WORDS = "a red shape the image what is on left describe this human assistant chat between curious hello sure yes no"
ADDED = ("[PAD]", "<vi_frame>", "<vi_start>", "<vi_end>", "<im_patch>", "<im_start>", "<im_end>")
NUM_PIECES = 360
OPTIONS = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
PICTURE = Image.new("RGB", (50, 40), (200, 30, 30))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The golden's weights with a byte-pair tokenizer as Llama's, trained here;
    ids of added tokens follow the pieces."""
    folder = tmp_path_factory.mktemp("published") / "policy"
    shutil.copytree(GOLDEN, folder, ignore=shutil.ignore_patterns("images", "golden.npz", "cases.json", "*token*"))
    generator = random.Random(0)
    sentences = [" ".join(generator.choices(WORDS.split(), k=12)) for _ in range(1000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=NUM_PIECES,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    added = {token: NUM_PIECES + index for index, token in enumerate(ADDED)}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {**special, "add_bos_token": True, "model_max_length": 2048, "tokenizer_class": "LlamaTokenizer"}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": "[PAD]"}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def original_ids(folder: Path, text: str, *, strip: bool) -> list[int]:
    """As LlamaTokenizer of transformers 4.28 tokenises: added tokens cut out, spaces beside them dropped, and every
    piece between them on its own."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = [pieces.bos_id()]
    parts = re.split("(" + "|".join(map(re.escape, ADDED)) + ")", text)
    for index, part in enumerate(parts):
        if part in ADDED:
            ids.append(NUM_PIECES + ADDED.index(part))
            continue
        if strip:
            part = part.lstrip() if index else part
            part = part.rstrip() if index + 1 < len(parts) else part
        ids += pieces.encode(part)
    return ids


@pytest.mark.parametrize("strip", [True, False])
def test_ids_are_those_of_the_original_s_tokenizer(folder, strip):
    settings = {} if strip else {"strip_around_images": False}
    processor = load_processor(folder, prompt_style="original_demo", default_system="a chat", **settings)
    assert processor.strip_around_images is strip
    said = [{"role": "user", "content": "what is this\n<video>\nhello  "}]
    inputs = processor.apply_chat_template(said, images=[PICTURE] * 3, **OPTIONS)
    block = f"<im_start>{'<im_patch>' * 256}<im_end><vi_start>{'<vi_frame>' * 3}<vi_end>"
    text = f"a chat\n\n### Human: what is this\n{block}\nhello   \n###"
    assert inputs["input_ids"][0].tolist() == original_ids(folder, text, strip=strip)


def test_prompt_and_response_tokenised_apart_are_the_tokens_of_the_whole(folder):
    processor = load_processor(folder, default_system="a chat")
    ask = [{"role": "user", "content": "what is this"}]
    whole = [*ask, {"role": "assistant", "content": "a red shape"}]
    prompt = processor.apply_chat_template(ask, add_generation_prompt=True)
    response = processor.apply_chat_template(whole)[len(prompt) :]
    ids = processor.apply_chat_template(ask, add_generation_prompt=True, **OPTIONS)["input_ids"][0].tolist()
    ids += processor.tokenizer(response, add_special_tokens=False)["input_ids"]
    text = "a chat\n\n### Human: what is this\n### Assistant: a red shape\n###"
    assert ids == original_ids(folder, text, strip=True)


def test_the_model_and_a_checkpoint_made_from_it_know_the_added_tokens(folder, tmp_path):
    model, processor = load_model(folder), load_processor(folder)
    assert model.config.image_token_id == processor.image_token_id == NUM_PIECES + ADDED.index("<im_patch>")
    saved = save_checkpoint(model, processor, tmp_path / "saved")
    assert (saved / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    reopened = load_processor(saved)
    said = [{"role": "user", "content": "<image>\nwhat is this"}]
    before, after = (
        p.apply_chat_template(said, images=[PICTURE], **OPTIONS)["input_ids"] for p in (processor, reopened)
    )
    assert before.tolist() == after.tolist()


def test_without_sentencepiece_the_message_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(UserError, match=r"which needs SentencePiece: pip install sentencepiece"):
        load_processor(folder)
