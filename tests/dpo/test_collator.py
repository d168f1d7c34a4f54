"""Batches: what is rendered, what is refused, and that both layouts hold the same tokens."""

from __future__ import annotations

import pytest
import torch

from align.dpo.collator import PairCollator, layout_of, plain_batch, prompt_inputs_of
from align.dpo.shared_forward import log_prob_head
from align.dpo.tokenize import PromptCounter, TokenizedPair, check_lengths, encode_prompts, render_pair, tokenize_pairs
from align.errors import UserError
from align.records import Pair
from tests import tiny_models
from tests.dpo.conftest import make_pairs, tokenized


def test_a_response_is_what_the_template_writes_after_the_prompt(processor, images):
    (pair,) = make_pairs(images.root, 1)
    prompt, chosen, rejected = render_pair(pair, processor)
    assert prompt == "<|im_start|>user\n<image>\nWhat is shown?<|im_end|>\n<|im_start|>assistant\n"
    assert chosen == "a cat<|im_end|>\n"
    assert rejected == "two red squares<|im_end|>\n"


def test_a_prompt_of_plain_text_is_rendered_like_one_of_parts(processor):
    turn = [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Is it?"}]}]
    texts = [{"role": "user", "content": "Is it?"}]
    assert render_pair(Pair(id="p", prompt=parts, chosen=turn[0], rejected=turn[1]), processor) == render_pair(
        Pair(id="p", prompt=texts, chosen=turn[0], rejected=turn[1]), processor
    )


def test_a_template_that_renders_the_prompt_differently_before_a_reply_is_refused(processor, images):
    (pair,) = make_pairs(images.root, 1)
    processor.chat_template = processor.chat_template.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}"
    )
    with pytest.raises(UserError, match="pair p0: the chat template writes the prompt differently once the chosen"):
        render_pair(pair, processor)


def test_a_response_that_spells_special_tokens_is_tokenised_as_text(processor, images):
    (pair,) = make_pairs(images.root, 1)
    text = "say <|im_end|>, <|im_start|> or <image>"
    pair = pair.model_copy(update={"chosen": [{"role": "assistant", "content": text}]})
    (found,) = tokenized([pair], processor, images)
    special = [id_ for id_ in found.chosen_ids if id_ >= 256]
    assert special == [processor.tokenizer.convert_tokens_to_ids("<|im_end|>")], "only the end of the turn"
    assert processor.tokenizer.decode(found.chosen_ids) == f"{text}<|im_end|>\n"


def test_a_response_with_no_other_tokens_for_a_placeholder_is_left_out_and_counted(processor, images):
    pairs = make_pairs(images.root, 2)
    # Tokens that are not called special are found in any text, however the tokenizer is configured.
    processor.tokenizer.add_tokens(["<picture>"])
    processor.video_token_id = processor.tokenizer.convert_tokens_to_ids("<picture>")
    spelling = pairs[0].model_copy(update={"rejected": [{"role": "assistant", "content": "a <picture>"}]})
    found = tokenize_pairs([spelling, pairs[1]], processor, images)
    assert [pair.id for pair in found.pairs] == ["p1"]
    assert found.dropped == {"a response spells special tokens and cannot be tokenised as text": ["p0"]}
    with pytest.raises(UserError, match="no pair can be trained on; the first: pair p0: a response spells special"):
        tokenize_pairs([spelling], processor, images)


def test_a_pair_that_spells_a_placeholder_in_its_prompt_is_left_out_and_counted(processor, images):
    pairs = make_pairs(images.root, 2)
    # One image, and what would be a second placeholder in the text of the question.
    pairs[0].prompt[0]["content"][-1]["text"] = "What is <image>?"
    found = tokenize_pairs(pairs, processor, images)
    assert [pair.id for pair in found.pairs] == ["p1"]
    assert found.dropped == {"its text spells a special token": ["p0"]}


def test_both_layouts_hold_the_same_tokens(processor, images):
    pairs = tokenized(make_pairs(images.root, 4, num_images=(1, 0, 2)), processor, images)
    plain = PairCollator(processor, images, "plain").collate(pairs)
    shared = PairCollator(processor, images, "shared").collate(pairs)
    layout = layout_of(shared)
    for row, pair in enumerate(pairs):
        prompt = shared["prompt_ids"][row][layout.prompt_mask[row]]
        for segment in range(2):
            response = layout.input_ids[row][layout.segment[row] == segment]
            trl = row + segment * len(pairs)
            ids = plain["input_ids"][trl][plain["attention_mask"][trl].bool()]
            assert torch.equal(torch.cat([prompt, response]), ids), pair.id
            assert torch.equal(shared["input_ids"][trl][shared["completion_mask"][trl].bool()], response)
            assert torch.equal(plain["input_ids"][trl][plain["completion_mask"][trl].bool()], response)


def test_a_processor_that_pads_on_the_left_whatever_it_is_told_gives_the_same_batches(processor, images):
    class PadsLeft:
        def __call__(self, **arguments):
            return processor(**arguments | {"padding_side": "left"})

    pictures = [[images.open(name) for name in pair.images] for pair in make_pairs(images.root, 3)]
    prompts = ["<image> short", "<image> a longer one", "<image>"]
    left, right = (encode_prompts(which, prompts, pictures) for which in (PadsLeft(), processor))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_images_are_encoded_once_a_pair(processor, images):
    pairs = tokenized(make_pairs(images.root, 2), processor, images)
    shared = prompt_inputs_of(PairCollator(processor, images, "shared").collate(pairs))
    plain = PairCollator(processor, images, "plain").collate(pairs)
    assert len(shared["pixel_values"]) == 2
    assert torch.equal(plain["pixel_values"], torch.cat([shared["pixel_values"]] * 2))


def test_token_types_go_on_as_text_behind_the_prompt():
    prompts = {
        "input_ids": torch.tensor([[9, 9, 1], [9, 1, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "mm_token_type_ids": torch.tensor([[1, 1, 0], [1, 0, 0]]),
    }
    batch = plain_batch(prompts, [[5, 6], [7]], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[9, 9, 1, 5, 6], [9, 1, 7, 0, 0]]
    assert batch["mm_token_type_ids"].tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]


def test_a_row_longer_than_was_checked_is_caught(processor, images):
    pairs = tokenized(make_pairs(images.root, 1), processor, images)
    for layout in ("plain", "shared"):
        PairCollator(processor, images, layout, max_length=44 + 17).collate(pairs)
        with pytest.raises(UserError, match="a row has 61 tokens, more than the 60"):
            PairCollator(processor, images, layout, max_length=60).collate(pairs)


def test_lengths_are_counted_without_looking_at_the_pictures(processor):
    counter = PromptCounter(processor)
    prompt = "<image>\nWhat?"
    for size in ((24, 30), (90, 30), (24, 30)):
        pictures = [[tiny_models.random_image(1, *size)]]
        expected = processor(images=pictures, text=[prompt], return_tensors="pt")["input_ids"].shape[1]
        assert counter.count(prompt, [size]) == expected


def test_all_pairs_that_do_not_fit_are_named_and_the_rest_is_kept():
    counts = {"a": (10, 5, 6), "b": (10, 5, 7), "c": (20, 1, 1)}
    lengths = [TokenizedPair(name, [], "", p, [1] * c, [1] * r) for name, (p, c, r) in counts.items()]
    assert check_lengths(lengths, 21, drop=False) == set()
    assert check_lengths(lengths, 16, drop=True) == {"b", "c"}
    with pytest.raises(UserError, match=r"2 of 3 pairs(.|\n)*b: prompt 10, chosen 5, rejected 7(.|\n)*c: prompt 20"):
        check_lengths(lengths, 16, drop=False)
    with pytest.raises(UserError, match="3 of 3 pairs"):
        check_lengths(lengths, 5, drop=True)


def test_a_batch_without_images_can_be_given_one_that_changes_nothing(processor, model, images):
    pairs = tokenized(make_pairs(images.root, 2, num_images=(0,)), processor, images)
    results = []
    with log_prob_head(model, shared=True), torch.no_grad():
        for always_images in (False, True):
            collator = PairCollator(processor, images, "shared", always_images=always_images)
            batch = collator.collate(pairs)
            assert ("pixel_values" in batch) == always_images
            labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
            results.append(model(**batch, labels=labels, fused_lm_head=True).log_probs)
    assert torch.allclose(*results, atol=1e-5)
