"""Converting a checkpoint changes names and files, never a value."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

from align.errors import UserError
from align.models.convert import CONVERSIONS, convert
from align.models.llava_lmms import hf_layout
from align.models.load import load_model, load_processor
from align.models.weights import tensor_table

GOLDEN = Path(__file__).parents[1] / "golden" / "llava_ov_original_tiny"


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """The golden in llava-hf's layout."""
    return convert(GOLDEN, tmp_path_factory.mktemp("converted") / "hf", to="llava-hf").folder


def stored(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same_tensors(left, right):
    left, right = stored(left), stored(right)
    return set(left) == set(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def copied_with(folder, path, **changes):
    """A copy of a folder whose tensors are changed: a function per name."""
    shutil.copytree(folder, path)
    tensors = stored(path)
    save_file(
        {name: changes.get("every", lambda t: t)(tensor) for name, tensor in tensors.items()},
        path / "model.safetensors",
    )
    return path


def test_llava_hf_and_back_is_the_same_folder_to_the_bit(hf, tmp_path):
    back = convert(hf, tmp_path / "back", to="lmms")
    assert (back.num_tensors, back.num_dropped_rows) == (85, 0)
    assert same_tensors(back.folder, GOLDEN)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (GOLDEN, back.folder))
    assert after.pop("converted_from")["architecture"] == "LlavaOnevisionForConditionalGeneration"
    assert after == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_what_it_is(dtype, tmp_path):
    source = copied_with(GOLDEN, tmp_path / "source", every=lambda tensor: tensor.to(dtype))
    there = convert(source, tmp_path / "hf", to="llava-hf").folder
    assert {tensor.dtype for tensor in stored(there).values()} == {dtype}
    assert json.loads((there / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert same_tensors(convert(there, tmp_path / "back", to="lmms").folder, source)


def test_names_are_those_of_llava_hf(hf):
    names = set(tensor_table(hf))
    assert {
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.self_attn.q_proj.bias",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
        "image_newline",
    } <= names
    assert {name.split(".")[0] for name in names} == {
        "language_model",
        "vision_tower",
        "multi_modal_projector",
        "image_newline",
    }


@pytest.mark.parametrize("to", ["llava-hf", "native"])
def test_transformers_own_class_computes_the_same(to, tmp_path):
    """On a size where un-padding by rounding and by truncation agree, through its own image processor and template."""
    folder = convert(GOLDEN, tmp_path / to, to=to).folder
    theirs, ours = load_model(folder), load_model(GOLDEN)
    assert type(theirs) is LlavaOnevisionForConditionalGeneration
    content = [{"type": "image"}, {"type": "text", "text": "What is shown in this image?"}]
    image = Image.open(GOLDEN / "images" / "square_small_0.png")
    logits, ids = [], []
    for model, source in ((theirs, folder), (ours, GOLDEN)):
        processor = load_processor(source)
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[[image]], text=[text], return_tensors="pt", add_special_tokens=False)
        ids.append(inputs["input_ids"])
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    assert torch.equal(*ids)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def test_what_transformers_saves_from_it_converts_back(tmp_path, hf):
    load_model(hf).save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copyfile(hf / name, tmp_path / "saved" / name)
    assert same_tensors(convert(tmp_path / "saved", tmp_path / "back", to="lmms").folder, GOLDEN)


def test_the_image_tokens_come_and_go(hf, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(hf)
    assert tokenizer.convert_tokens_to_ids(["<image>", "<video>"]) == [267, 268]
    config = json.loads((hf / "config.json").read_text())
    assert (config["image_token_index"], config["video_token_index"]) == (267, 268)
    back = convert(hf, tmp_path / "back", to="lmms").folder
    restored = load_processor(back)
    assert "<image>" not in restored.tokenizer.get_vocab()
    text = "<|im_start|>user\nWhat is this?<|im_end|>\n"
    original = load_processor(GOLDEN)
    assert restored.tokenizer(text)["input_ids"] == original.tokenizer(text)["input_ids"]
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    assert restored.apply_chat_template(messages) == original.apply_chat_template(messages)


def test_the_template_of_the_copy_writes_what_the_original_does(hf):
    theirs, ours = load_processor(hf), load_processor(GOLDEN)
    image, text = {"type": "image"}, {"type": "text", "text": "Which?"}
    conversations = [
        [{"role": "user", "content": [image, text]}],
        [{"role": "user", "content": [image, image, text]}],
        [{"role": "user", "content": [text, image]}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [image, text]}],
        [
            {"role": "user", "content": [text]},
            {"role": "assistant", "content": [text]},
            {"role": "user", "content": [text]},
        ],
    ]
    for conversation in conversations:
        texts = [p.apply_chat_template(conversation, add_generation_prompt=True) for p in (theirs, ours)]
        assert texts[0] == texts[1]


def padded(folder, path, num_rows):
    """A llava-hf folder whose vocabulary has more rows, as llava-hf appended them, and that remembers no origin."""
    shutil.copytree(folder, path)
    tensors = stored(path)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        extra = torch.randn(num_rows - len(tensors[name]), tensors[name].shape[1])
        tensors[name] = torch.cat((tensors[name], extra))
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["vocab_size"] = num_rows
    del config["converted_from"]
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_rows_that_llava_hf_appended_are_left_out(hf, tmp_path, monkeypatch):
    monkeypatch.setitem(hf_layout.PADDED_ROWS, 337, 273)
    source = padded(hf, tmp_path / "padded", 337)
    made = convert(source, tmp_path / "lmms", to="lmms")
    assert made.num_dropped_rows == 64
    assert same_tensors(made.folder, GOLDEN)
    config = json.loads((made.folder / "config.json").read_text())
    assert config["vocab_size"] == 273
    original = json.loads((GOLDEN / "config.json").read_text())
    for key in ("rope_theta", "mm_patch_merge_type", "image_aspect_ratio", "image_grid_pinpoints", "hidden_size"):
        assert config[key] == original[key]
    assert load_processor(made.folder).num_image_tokens(1400, 1100) == 7261
    case = json.loads((GOLDEN / "cases.json").read_text())[0]
    processor, model = load_processor(made.folder), load_model(made.folder)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": case["turns"][0]}],
        images=[GOLDEN / case["images"][0]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert tokens[0, inputs["input_ids"].shape[1] :].tolist() == case["greedy"]


def test_a_vocabulary_of_unknown_size_is_kept(hf, tmp_path):
    made = convert(padded(hf, tmp_path / "padded", 300), tmp_path / "lmms", to="lmms")
    assert made.num_dropped_rows == 0
    assert tensor_table(made.folder)["lm_head.weight"].shape == (300, 64)


def test_shards_stay_shards(tmp_path):
    source = shutil.copytree(GOLDEN, tmp_path / "source")
    tensors = stored(source)
    halves = {
        "model-00001-of-00002.safetensors": list(tensors)[::2],
        "model-00002-of-00002.safetensors": list(tensors)[1::2],
    }
    for file, names in halves.items():
        save_file({name: tensors[name] for name in names}, source / file)
    (source / "model.safetensors").unlink()
    weight_map = {name: file for file, names in halves.items() for name in names}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    there = convert(source, tmp_path / "hf", to="llava-hf").folder
    index = json.loads((there / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in tensors.values())
    assert set(index["weight_map"]) == set(tensor_table(there))
    assert len(list(there.glob("*.safetensors"))) == 2


def test_the_published_vocabularies_are_cut_where_llava_hf_appended_rows():
    """7B and 72B: 152,064 rows and two new tokens, rounded up to 64s; 0.5B likewise from 151,936."""
    assert hf_layout.rows_for_lmms({}, 152128) == 152064 == 152128 - 64
    assert hf_layout.rows_for_lmms({}, 152000) == 151936
    origin = {"converted_from": {"architecture": "LlavaQwenForCausalLM", "config": {"vocab_size": 152064}}}
    assert hf_layout.rows_for_lmms(origin, 152064) == 152064


def test_a_delta_is_added_to_its_base(tmp_path):
    for name, value in (("delta", 2.0), ("base", 1.0)):
        (tmp_path / name).mkdir()
        save_file({"model.norm.weight": torch.full((3,), value)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    made = convert(tmp_path / "delta", tmp_path / "sum", to="whole", base=tmp_path / "base")
    assert stored(made.folder)["model.norm.weight"].tolist() == [3.0, 3.0, 3.0]
    assert (made.num_tensors, made.num_bytes) == (1, 12)


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(tmp_path):
    eagle = GOLDEN.parent / "valley_eagle_tiny"
    with pytest.raises(
        UserError, match=r"expected LlavaQwenForCausalLM or LlavaOnevision.*found 'ValleyQwen2ForCausalLM'"
    ):
        convert(eagle, tmp_path / "out", to="llava-hf")
    with pytest.raises(UserError, match="expected one of llava-hf, lmms, native, whole, found 'gguf'"):
        convert(GOLDEN, tmp_path / "out", to="gguf")
    with pytest.raises(UserError, match="whole: expected a base model"):
        convert(GOLDEN, tmp_path / "out", to="whole")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="a folder that is not there yet"):
        convert(GOLDEN, tmp_path / "out", to="lmms")
    assert all(conversion.description for conversion in CONVERSIONS.values())
