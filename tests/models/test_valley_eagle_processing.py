"""Conversations and settings of Valley-Eagle's processor."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import align.models  # noqa: F401  (registers the family)
from align.models.valley_eagle import ValleyProcessor
from tests.models import tiny_valley

GOLDEN = Path(__file__).parents[1] / "golden" / "valley_eagle_tiny"
START, END = "<im_start>", "<im_end>"
MARK = f"{START}<image>{END}"
IMAGE = Image.new("RGB", (50, 40), (200, 30, 30))
TENSORS = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(GOLDEN)


def user_turn(processor, content, **options):
    """What a user turn is rendered to."""
    text = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    return text.split("<|im_start|>user\n")[1].removesuffix("<|im_end|>\n")


def test_leading_images_are_joined_by_a_space_and_set_off_by_a_line_break(processor):
    parts = [{"type": "image", "image": IMAGE}, {"type": "image", "image": IMAGE}, {"type": "text", "text": "Compare."}]
    assert user_turn(processor, parts) == f"{MARK} {MARK}\nCompare."


def test_images_inside_a_text_stay_in_place(processor):
    parts = [{"type": "text", "text": "Is "}, {"type": "image", "image": IMAGE}, {"type": "text", "text": " red?"}]
    assert user_turn(processor, parts) == f"Is {MARK} red?"


def test_a_text_that_names_all_images_places_them(processor):
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Compare <image> with <image>."}]
    assert user_turn(processor, parts) == f"Compare {MARK} with {MARK}."


def test_images_without_a_place_go_in_front_of_the_first_user_turn(processor):
    messages = [
        {"role": "user", "content": "What is this?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    text = processor.apply_chat_template(messages, images=[IMAGE, IMAGE])
    assert text.count(MARK) == 2
    assert f"user\n{MARK} {MARK}\nWhat is this?<|im_end|>" in text


def test_a_mark_that_is_wrapped_already_is_not_wrapped_again(processor):
    assert user_turn(processor, f"{MARK}\nHi", images=[IMAGE]) == f"{MARK}\nHi"


def test_texts_that_name_some_images_only_are_refused(processor):
    parts = [
        {"type": "image", "image": IMAGE},
        {"type": "image", "image": IMAGE},
        {"type": "text", "text": "See <image>."},
    ]
    with pytest.raises(ValueError, match="name all 2 images of the conversation as <image> or none, found 1"):
        user_turn(processor, parts)


def test_images_and_marks_must_agree_in_number(processor):
    with pytest.raises(ValueError, match="expected 1 images, as many as the text names, found 0"):
        processor(text="<image>\nHi")
    with pytest.raises(ValueError, match="expected 1 images, as many as the texts name, found 2"):
        processor(text="<image>\nHi", images=[IMAGE, IMAGE])
    with pytest.raises(ValueError, match="expected images for 2 texts, found them for 1"):
        processor(text=["<image>", "<image>"], images=[[IMAGE]])


def test_a_text_that_contains_the_placeholder_itself_is_refused(processor):
    with pytest.raises(ValueError, match="stands for visual tokens"):
        processor(text="<|image_pad|> hello")


def test_truncation_is_refused(processor):
    with pytest.raises(ValueError, match="truncation"):
        processor(text="hello", truncation=True)


def test_system_conventions():
    def system(**settings):
        text = AutoProcessor.from_pretrained(GOLDEN, **settings).apply_chat_template(
            [{"role": "user", "content": "Hi"}]
        )
        return text.split("<|im_end|>")[0].removeprefix("<|im_start|>system\n")

    assert system() == "You are a helpful assistant."
    assert system(default_system=None) == "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert system(default_system="You are Valley.") == "You are Valley."


def test_a_given_system_turn_is_kept(processor):
    text = processor.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    )
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert text.count("<|im_start|>system") == 1


def test_text_only_has_no_image_unless_the_black_one_is_asked_for(processor):
    messages = [{"role": "user", "content": "Hi"}]
    assert set(processor.apply_chat_template(messages, **TENSORS)) == {"input_ids", "attention_mask"}
    black = AutoProcessor.from_pretrained(GOLDEN, text_only_image="black").apply_chat_template(messages, **TENSORS)
    assert black["image_sizes"].tolist() == [[3, 3]]
    assert (black["input_ids"] == 268).sum() == 396


def test_the_default_cap_is_the_checkpoints_training_cap(processor):
    assert processor.max_pixels == 571536
    assert processor.num_image_tokens(1024, 768) == 1260 + 713
    published = AutoProcessor.from_pretrained(GOLDEN, max_pixels=12845056)
    assert published.num_image_tokens(1024, 768) == 1260 + 999


def test_several_images_are_not_tiled(processor):
    assert processor.num_image_tokens(640, 480, num_images=1) == 812 + 391
    assert processor.num_image_tokens(640, 480, num_images=2) == 196 + 391


def test_min_pixels_enlarges_small_images():
    processor = AutoProcessor.from_pretrained(GOLDEN, min_pixels=100 * 784)
    # 28 x 28 grows by sqrt(100): 280 x 280, which are 10 x 10 merged patches.
    assert processor.num_image_tokens(28, 28, num_images=2) == 196 + 100


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (50, 40), (1000, 100), (97, 701), (400, 2)])
@pytest.mark.parametrize("num_images", [1, 2])
def test_the_count_is_the_number_of_placeholders(size, num_images, processor):
    image = Image.new("RGB", size)
    inputs = processor.apply_chat_template([{"role": "user", "content": "Hi"}], images=[image] * num_images, **TENSORS)
    placeholders = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert placeholders == num_images * processor.num_image_tokens(*size, num_images=num_images)


def test_an_extreme_shape_is_refused_with_its_size(processor):
    with pytest.raises(ValueError, match="found 10000x1"):
        processor.apply_chat_template(
            [{"role": "user", "content": "Hi"}], images=[Image.new("RGB", (10000, 1))], **TENSORS
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_pixel": 1}, "unknown setting 'max_pixel' .* did you mean max_pixels"),
        ({"text_only_image": "white"}, "expected 'none' or 'black', found 'white'"),
        ({"max_pixels": 100}, "expected 0 < min_pixels <= max_pixels, found 3136 and 100"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoProcessor.from_pretrained(GOLDEN, **settings)


def test_text_around_images_is_tokenized_in_pieces(processor):
    # "Ġthe" is one token of this vocabulary; cut by an image it must not be joined across it.
    ids = processor(text=f"at {MARK}the{MARK} the", images=[IMAGE, IMAGE])["input_ids"][0]
    pieces = [processor.tokenizer(piece)["input_ids"] for piece in (f"at {START}", f"{END}the{START}", f"{END} the")]
    placeholders = [processor.image_token_id] * processor.num_image_tokens(50, 40, num_images=2)
    assert ids == pieces[0] + placeholders + pieces[1] + placeholders + pieces[2]


def test_a_batch_is_padded_on_the_left_for_generation_and_as_asked_otherwise(processor):
    conversations = [[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Hello there"}]]
    batch = processor.apply_chat_template(conversations, **TENSORS)
    assert batch["attention_mask"][0, 0] == 0
    assert batch["input_ids"][0, 0] == processor.tokenizer.pad_token_id
    right = processor.apply_chat_template(conversations, **{**TENSORS, "padding_side": "right"})
    assert right["attention_mask"][0, 0] == 1
    assert right["attention_mask"][0, -1] == 0


def test_batches_mix_images_and_none(processor):
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "Hi"}]}],
        [{"role": "user", "content": "Hi"}],
        [{"role": "user", "content": [{"type": "image", "image": IMAGE}] * 2 + [{"type": "text", "text": "Hi"}]}],
    ]
    batch = processor.apply_chat_template(conversations, **TENSORS)
    counts = (batch["input_ids"] == processor.image_token_id).sum(dim=-1).tolist()
    single, double = processor.num_image_tokens(50, 40), processor.num_image_tokens(50, 40, num_images=2)
    assert counts == [single, 0, 2 * double]
    assert batch["tiles_per_image"].tolist() == [2, 1, 1]
    assert len(batch["pixel_values"]) == 4
    assert len(batch["eagle_pixel_values"]) == batch["image_grid_thw"].prod(dim=-1).sum()


def test_settings_survive_saving(tmp_path):
    processor = AutoProcessor.from_pretrained(GOLDEN, max_pixels=100352, default_system=None, text_only_image="black")
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    again = AutoProcessor.from_pretrained(tmp_path)
    assert (again.max_pixels, again.default_system, again.text_only_image) == (100352, None, "black")
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == "ValleyProcessor"


def test_small_tiles_and_a_word_tokenizer_work(tmp_path):
    folder = tiny_valley.folder(tmp_path)
    processor = AutoProcessor.from_pretrained(folder)
    words = tiny_valley.tokenizer()
    assert processor.image_token_id == words.convert_tokens_to_ids("<|image_pad|>") != 268
    inputs = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": Image.new("RGB", (112, 112))}, {"type": "text", "text": "what"}],
            }
        ],
        **TENSORS,
    )
    # One 112-pixel tile of 4 x 4 tokens twice, and 112 / 28 squared from the second encoder.
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 16 + 16 + 16
    assert inputs["pixel_values"].shape == (2, 3, 112, 112)


def test_arguments_that_would_do_nothing_are_refused(processor):
    with pytest.raises(ValueError, match="ValleyProcessor does not know max_length"):
        processor(text="hello", max_length=10)
    with pytest.raises(ValueError, match="truncation is not supported"):
        processor.apply_chat_template([{"role": "user", "content": "Hi"}], truncation=True)
    assert processor(text="hello", videos=None)["input_ids"]


def test_a_video_is_its_frames_as_untiled_images_within_a_limit_of_their_own():
    processor = AutoProcessor.from_pretrained(GOLDEN)
    assert processor.frame_indices(100) == [0, 14, 28, 42, 56, 70, 84, 99]
    frames = [Image.new("RGB", (1024, 768), (shade, 0, 0)) for shade in (10, 200)]
    content = [{"type": "video", "video": frames}, {"type": "text", "text": "Hi"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **TENSORS)
    assert inputs["tiles_per_image"].tolist() == [1, 1]
    # 1036 x 756 after the first resize; at most 153,664 pixels: shrunk by 2.2577 to 16 x 11 times 28 pixels.
    assert inputs["image_grid_thw"].tolist() == [[1, 22, 32]] * 2
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 2 * (196 + 176)
    as_images = processor.apply_chat_template([{"role": "user", "content": "Hi"}], images=frames, **TENSORS)
    assert as_images["image_grid_thw"].tolist() == [[1, 46, 62]] * 2
    render = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Hi"}]}]
    text = processor.apply_chat_template(render, add_generation_prompt=True)
    again = processor(text=[text], videos=[[frames]], return_tensors="pt")
    assert torch.equal(again["input_ids"], inputs["input_ids"])


def test_a_tokenizer_without_a_padding_token_pads_with_its_end():
    words = tiny_valley.tokenizer()
    words.pad_token = None
    made = ValleyProcessor(words, config=tiny_valley.config())
    asked = [[{"role": "user", "content": text}] for text in ("what is this", "what")]
    batch = made.apply_chat_template(asked, tokenize=True, return_dict=True, return_tensors="pt")
    padding = batch["input_ids"][batch["attention_mask"] == 0]
    assert padding.tolist() == [words.eos_token_id] * 2


def test_an_empty_conversation_is_refused(processor):
    for asked in ([], [[{"role": "user", "content": "Hi"}], []]):
        with pytest.raises(ValueError, match="found an empty conversation"):
            processor.apply_chat_template(asked)
