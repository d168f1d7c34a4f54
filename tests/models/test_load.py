"""Checkpoints opened, and folders that cannot be opened refused with what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from align.errors import UserError
from align.models.load import load_model, load_processor, read_config
from align.models.valley_eagle import ValleyEagleConfig, ValleyProcessor, ValleyQwen2ForCausalLM
from tests import tiny_models
from tests.models import tiny_valley

GOLDEN = Path(__file__).parents[1] / "golden" / "valley_eagle_tiny"
CHECKPOINT_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json", "vocab.json")


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden checkpoint to break."""
    for name in (*CHECKPOINT_FILES, "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        shutil.copyfile(GOLDEN / name, tmp_path / name)
    return tmp_path


def edit(path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_our_loader_gives_the_family_of_the_architecture():
    model = load_model(GOLDEN, dtype="bfloat16", attn_implementation="eager")
    assert type(model) is ValleyQwen2ForCausalLM
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert not model.training
    processor = load_processor(GOLDEN, max_pixels=100352)
    assert type(processor) is ValleyProcessor
    assert processor.max_pixels == 100352


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_auto_classes_give_our_family(auto_class):
    assert type(auto_class.from_pretrained(GOLDEN)) is ValleyQwen2ForCausalLM
    assert type(AutoConfig.from_pretrained(GOLDEN)) is ValleyEagleConfig
    assert type(AutoProcessor.from_pretrained(GOLDEN)) is ValleyProcessor


def test_code_of_a_checkpoint_is_never_asked_for(folder):
    code = {
        "AutoConfig": "evil.ValleyConfig",
        "AutoModelForImageTextToText": "evil.Model",
        "AutoProcessor": "evil.Processor",
    }
    edit(folder / "config.json", auto_map=code)
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoProcessor": "evil.Processor"},
        processor_class="ValleyProcessor",
    )
    (folder / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    assert type(load_model(folder)) is ValleyQwen2ForCausalLM
    assert type(load_processor(folder)) is ValleyProcessor
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is ValleyQwen2ForCausalLM
    assert type(AutoProcessor.from_pretrained(folder)) is ValleyProcessor


def test_the_image_token_is_read_from_the_tokenizer_unless_config_says(folder):
    assert AutoConfig.from_pretrained(folder).image_token_id == 268
    assert ValleyEagleConfig.from_pretrained(folder).image_token_id == 268
    edit(folder / "config.json", image_token_id=269)
    assert AutoConfig.from_pretrained(folder).image_token_id == 269
    assert ValleyEagleConfig().image_token_id == 151655


@pytest.mark.parametrize("kept", ["added_tokens.json", "tokenizer_config.json"])
def test_one_tokenizer_file_is_enough_for_the_image_token(kept, folder):
    for name in {"added_tokens.json", "tokenizer_config.json"} - {kept}:
        (folder / name).unlink()
    assert ValleyEagleConfig.from_pretrained(folder).image_token_id == 268


def test_the_image_token_is_found_in_a_tokenizer_json(tmp_path):
    folder = tiny_valley.folder(tmp_path)
    edit(folder / "config.json", image_token_id=None)
    expected = tiny_valley.tokenizer().convert_tokens_to_ids("<|image_pad|>")
    assert ValleyEagleConfig.from_pretrained(folder).image_token_id == expected


def test_another_architecture_under_the_same_model_type_is_refused(folder):
    edit(folder / "config.json", architectures=["ValleyMistralForCausalLM"])
    with pytest.raises(
        ValueError, match=r"expected architectures to name one of ValleyQwen2ForCausalLM.*ValleyMistral"
    ):
        AutoConfig.from_pretrained(folder)
    with pytest.raises(UserError, match="'ValleyMistralForCausalLM'"):
        load_model(folder)


def test_transformers_own_models_open_without_torchvision(tmp_path):
    tiny_models.llava_onevision().save_pretrained(tmp_path)
    tiny_models.llava_onevision_processor().save_pretrained(tmp_path)
    model, processor = load_model(tmp_path), load_processor(tmp_path)
    assert type(model).__name__ == "LlavaOnevisionForConditionalGeneration"
    content = [{"type": "image", "image": tiny_models.random_image(0)}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


def test_a_folder_that_is_not_there_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no such folder"):
        read_config(tmp_path / "nothing")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids"):
        load_model("owner/name")


def test_folders_without_a_readable_config_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"found no config.json"):
        load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="found a LoRA adapter; merge it"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(UserError, match=r"config.json: expected a JSON object \(Expecting value"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object, found list"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "nearest"),
    [
        ("ValleyQwen2ForCausallM", "ValleyQwen2ForCausalLM"),
        ("LlavaOnevisionForConditionalGenerations", "LlavaOnevisionForConditionalGeneration"),
    ],
)
def test_an_unknown_architecture_is_refused_with_the_nearest_known(architecture, nearest, folder):
    edit(folder / "config.json", architectures=[architecture])
    with pytest.raises(UserError, match=f"found '{architecture}'; the nearest known one is {nearest}"):
        load_model(folder)


def test_a_text_model_is_refused(folder):
    edit(folder / "config.json", architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    with pytest.raises(
        UserError, match="expected the architecture of a vision-language model, found 'Qwen2ForCausalLM'"
    ):
        load_model(folder)


def test_a_config_that_the_family_refuses_is_a_user_error(folder):
    edit(folder / "config.json", mm_projector_type="linear")
    with pytest.raises(UserError, match="expected mm_projector_type to be one of"):
        load_model(folder)


def test_missing_and_pickled_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"expected weights \(model.safetensors\), found none"):
        load_model(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled .* set model.allow_pickle=true"):
        load_model(folder)
    model = load_model(folder, allow_pickle=True)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])


@pytest.mark.parametrize("kept", [4, 1000, -1])
def test_cut_weights_are_refused_before_they_are_loaded(kept, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model.safetensors: expected .*; the file is damaged"):
        load_model(folder)


def test_a_file_that_is_no_safetensors_is_refused(folder):
    (folder / "model.safetensors").write_bytes((5).to_bytes(8, "little") + b"hello")
    with pytest.raises(UserError, match="expected a safetensors header"):
        load_model(folder)


def test_a_missing_shard_is_refused(folder):
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    with pytest.raises(UserError, match=r"expected 2 weight files, 1 are missing: model-00002-of-00002.safetensors"):
        load_model(folder)


def test_missing_weights_are_refused_and_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are not in the checkpoint, such as model.norm.weight"):
        load_model(folder)


def test_weights_of_another_size_are_refused(folder):
    edit(folder / "config.json", intermediate_size=100)
    with pytest.raises(UserError, match=r"9 weights have other shapes .* \(64, 96\) in the file, \(64, 100\) expected"):
        load_model(folder)


def test_unknown_settings_of_a_processor_are_refused(folder):
    with pytest.raises(UserError, match="unknown setting 'max_pixel'"):
        load_processor(folder, max_pixel=3)
    with pytest.raises(UserError, match="expected a dtype such as auto, float32 or bfloat16, found 'half-ish'"):
        load_model(folder, dtype="half-ish")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"mlp_hidden_dim": "12"}, "TypeError: empty()"),
        ({"dtype": "float99"}, "no attribute 'float99'"),
        ({"grid_pinpoints": "[[384, 384"}, "expected pairs of pixels for the canvases of tiles, found '[[384, 384'"),
        ({"grid_pinpoints": [[384]]}, "expected pairs of pixels"),
        ({"grid_pinpoints": "[]"}, "expected canvases for tiles, found none"),
    ],
)
def test_nonsense_in_a_config_is_a_user_error_of_one_line(changes, message, folder):
    edit(folder / "config.json", **changes)
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_nonsense_in_a_file_of_the_processor_is_a_user_error(folder):
    (folder / "processor_config.json").write_text("[]")
    with pytest.raises(UserError, match="the processor cannot be opened: AttributeError: 'list' object"):
        load_processor(folder)


def test_the_file_that_is_checked_is_the_one_that_is_loaded(folder):
    """Beside a single file of weights transformers does not look at an index; a missing shard is none then."""
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00002.safetensors"}}')
    loaded = load_model(folder).state_dict()["lm_head.weight"]
    assert torch.equal(loaded, load_model(GOLDEN).state_dict()["lm_head.weight"])


def test_a_projector_without_layers_is_refused(tmp_path):
    shutil.copytree(GOLDEN.parent / "llava_ov_original_tiny", tmp_path / "copy")
    edit(tmp_path / "copy" / "config.json", mm_projector_type="mlp0x_gelu")
    with pytest.raises(UserError, match="expected mm_projector_type like mlp2x_gelu"):
        load_model(tmp_path / "copy")
