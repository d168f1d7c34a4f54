"""Parts by name: what belongs to which, what is frozen, what is refused."""

from __future__ import annotations

import pytest
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from align.errors import UserError
from align.models.lora import adapter_outside, check_frozen, lora_config
from align.models.meta import with_adapter
from align.models.modules import count_parameters, freeze_parts, parameters_of, part_names
from tests import tiny_models

TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config=TEXT | {"num_key_value_heads": 1, "rope_parameters": rope, "rope_scaling": rope},
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "mlp_ratio": 2},
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config)


def idefics3():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Idefics3Config(vision_config=vision | {"image_size": 28, "patch_size": 14}, scale_factor=2)
    config.text_config = type(config.text_config)(**TEXT, num_key_value_heads=1, pad_token_id=0)
    return Idefics3ForConditionalGeneration(config)


def test_every_parameter_of_llava_onevision_has_its_part():
    parts = part_names(tiny_models.llava_onevision())
    assert parts["model.vision_tower.embeddings.patch_embedding.weight"] == "vision"
    assert parts["model.multi_modal_projector.linear_2.bias"] == "projector"
    assert parts["model.image_newline"] == "projector"
    assert parts["model.language_model.layers.1.mlp.up_proj.weight"] == "language"
    assert set(parts.values()) == {"vision", "projector", "language"}


def test_the_merger_is_the_projector_where_there_is_no_other():
    parts = part_names(qwen2_vl())
    assert {name for name, part in parts.items() if part == "projector"} == {
        name for name in parts if ".merger." in name
    }
    assert any(part == "vision" for part in parts.values())


def test_a_connector_is_a_projector():
    parts = part_names(idefics3())
    assert {name for name, part in parts.items() if part == "projector"} == {
        name for name in parts if ".connector." in name
    }
    assert {parts[name] for name in parts if ".vision_model." in name} == {"vision"}


def test_embeddings_and_head_are_found_and_may_be_one():
    model = tiny_models.llava_onevision()
    assert parameters_of(model, "embeddings") == ["model.language_model.embed_tokens.weight"]
    assert parameters_of(model, "head") == ["lm_head.weight"]
    tied = tiny_models.llava_onevision(tied=True)
    assert parameters_of(tied, "embeddings") == parameters_of(tied, "head") != []


def test_a_part_may_be_the_beginning_of_a_name():
    model = tiny_models.llava_onevision()
    freeze_parts(model, ["model.language_model.layers.0", "vision"])
    for name, parameter in model.named_parameters():
        frozen = name.startswith("model.language_model.layers.0.") or "vision_tower" in name
        assert parameter.requires_grad != frozen, name
    counts = count_parameters(model)
    assert counts["vision"]["trained"] == 0 < counts["vision"]["frozen"]
    assert counts["language"]["trained"] > 0 < counts["language"]["frozen"]
    assert sum(sum(count.values()) for count in counts.values()) == sum(p.numel() for p in model.parameters())


def test_a_part_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"has no part 'model\.language_model\.layers\.7'"):
        freeze_parts(tiny_models.llava_onevision(), ["model.language_model.layers.7"])
    with pytest.raises(UserError, match="leaves nothing to train"):
        freeze_parts(tiny_models.llava_onevision(), ["model", "lm_head"])


@pytest.mark.parametrize("own", [None, ["v_proj"], r".*\.v_proj"])
def test_an_adapter_stays_out_of_frozen_parts(own):
    frozen = ["vision", "projector"]
    model = qwen2_vl()
    parts = part_names(model)
    adapter = lora_config({"r": 2, "target_modules": "all-linear", "exclude_modules": own})
    adapted = with_adapter(model, adapter_outside(model, adapter, frozen))
    check_frozen(qwen2_vl(), adapted, frozen)
    places = {name.partition(".lora_")[0] for name, weight in adapted.named_parameters() if weight.requires_grad}
    language = [name for name, part in parts.items() if part == "language"]
    expected = {name.removesuffix(".weight") for name in language if name.endswith("proj.weight")}
    assert places == {name for name in expected if own is None or not name.endswith("v_proj")}


def test_a_module_of_a_frozen_part_is_not_trained_as_a_whole():
    model = qwen2_vl()
    fields = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["merger"]}
    adapted = with_adapter(model, adapter_outside(model, lora_config(fields), ["projector"]))
    with pytest.raises(UserError, match=r"dpo.lora trains model.visual.merger\S* which is inside"):
        check_frozen(qwen2_vl(), adapted, ["projector"])
