"""Gradient checkpointing: what is computed again, and that gradients stay the same."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig

from align.config import Config
from align.dpo.auto_batch_size import remember_smaller_batch, with_batch_that_fits
from align.dpo.collator import PairCollator, pair_dataset
from align.dpo.settings import checkpointing_field
from align.dpo.step_memory import GIB, USABLE, How, StepBatch, least_recomputation, training_memory
from align.dpo.trainer import PairTrainer
from align.media.images import ImageStore
from align.models.modules import freeze_parts
from align.models.shapes import model_shape
from align.prefix.rows import decoder_layers
from scripts.valley_size import build_valley
from tests import tiny_models, tiny_vlms
from tests.dpo.conftest import make_args, make_pairs, tokenized

ADAPTER = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def trained(folder, model, processor, *, frozen=("vision",), adapter=None, kept_layers=0, **fields):
    """The trainer after a step whose gradients are kept, and the tower outputs of that step that required gradients."""
    if adapter is None:
        freeze_parts(model, frozen)
    pairs = tokenized(make_pairs(folder, 2), processor, ImageStore(folder))
    trainer = PairTrainer(
        model,
        args=make_args(folder / "out", max_steps=1, learning_rate=0.0, **fields),
        train_dataset=pair_dataset(pairs, [(-10.0, -12.0)] * 2),
        data_collator=PairCollator(processor, ImageStore(folder), layout="shared"),
        processor=processor,
        peft_config=LoraConfig(**adapter) if adapter else None,
        kept_layers=kept_layers,
    )
    flowing, gradients = set(), {}
    for name, module in trainer.model.named_modules():
        if ("vision_tower.encoder.layers." in name or "visual.blocks." in name) and name.endswith(("norm1", "norm2")):
            module.register_forward_hook(
                lambda module, _, output, name=name: flowing.add(name) if output.requires_grad else None
            )
    norm = trainer._get_grad_norm

    def keep(*args, **kwargs):
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.clone()
        return norm(*args, **kwargs)

    trainer._get_grad_norm = keep
    trainer.train()
    return flowing, gradients


@pytest.mark.parametrize("build", [tiny_models.llava_onevision, tiny_vlms.qwen2_vl])
def test_frozen_towers_are_neither_recomputed_nor_gone_through_backward(tmp_path, build):
    made = build(0) if build is tiny_models.llava_onevision else build()
    model, processor = made if isinstance(made, tuple) else (made, tiny_models.llava_onevision_processor())
    calls = []
    tower = next(module for name, module in model.named_modules() if name.endswith(("vision_tower", "visual")))
    first_norm = next(module for module in tower.modules() if isinstance(module, torch.nn.LayerNorm))
    first_norm.register_forward_hook(lambda *_: calls.append(1))
    flowing, gradients = trained(tmp_path, model, processor, gradient_checkpointing=True)
    assert not flowing
    assert len(calls) == 1
    assert not any("vision_tower" in name or "visual.blocks" in name for name in gradients)
    assert any("layers.0" in name for name in gradients)


@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_gradients_with_checkpointing_are_those_without(tmp_path, adapter):
    found = []
    for number, checkpointing in enumerate((False, True)):
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.manual_seed(0)
        _, gradients = trained(
            folder,
            tiny_models.llava_onevision(0),
            tiny_models.llava_onevision_processor(),
            adapter=adapter,
            gradient_checkpointing=checkpointing,
        )
        found.append(gradients)
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys()
    assert any(gradient.abs().sum() > 0 for gradient in plain.values())
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], rtol=1e-5, atol=1e-7)


def test_an_adapter_on_the_tower_learns_under_reentrant_checkpointing(tmp_path):
    model, processor = tiny_models.llava_onevision(0), tiny_models.llava_onevision_processor()
    kwargs = {"use_reentrant": True}
    flowing, gradients = trained(
        tmp_path, model, processor, adapter=ADAPTER, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs
    )
    assert flowing
    assert any("vision_tower" in name and gradient.abs().sum() > 0 for name, gradient in gradients.items())


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_the_last_layers_may_keep_their_activations_and_gradients_stay_the_same(tmp_path, kept):
    model, processor = tiny_models.llava_onevision(0), tiny_models.llava_onevision_processor()
    calls = []
    for number, layer in enumerate(decoder_layers(model)):
        layer.input_layernorm.register_forward_hook(lambda *_, number=number: calls.append(number))
    assert len(decoder_layers(model)) == 2
    _, gradients = trained(tmp_path, model, processor, gradient_checkpointing=True, kept_layers=kept)
    assert [calls.count(number) for number in range(2)] == [1 if number >= 2 - kept else 2 for number in range(2)]
    (tmp_path / "again").mkdir()
    _, expected = trained(tmp_path / "again", tiny_models.llava_onevision(0), processor)
    assert gradients.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def seven_billion():
    """The shape of Valley-Eagle-7B on one of eight GPUs, and a pair."""
    model, _ = build_valley("valley-eagle-7b", "meta", torch.float32)
    how = How(strategy="zero3", num_processes=8, compute_bytes=2, checkpointing=True)
    return model_shape(model), StepBatch(1, 1987, 200, 200), how


@pytest.mark.parametrize("kept", [1, 14, 27])
def test_as_few_layers_are_recomputed_as_memory_demands(seven_billion, kept):
    shape, batch, how = seven_billion
    enough = training_memory(shape, batch, replace(how, kept_layers=kept)).total
    found = least_recomputation(shape, batch, how, enough)
    assert (found.checkpointing, found.kept_layers) == (True, kept)
    assert least_recomputation(shape, batch, how, enough - 1).kept_layers == kept - 1


def test_nothing_is_recomputed_in_seven_billion_weights_over_eight_gpus(seven_billion):
    assert not least_recomputation(*seven_billion, int(80 * GIB * USABLE)).checkpointing
    assert least_recomputation(*seven_billion, 0) == seven_billion[2]


def test_a_training_of_its_own_choice_that_runs_out_of_memory_recomputes_every_layer_first(tmp_path):
    fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, checkpointing_field(): "auto"}
    remember_smaller_batch(tmp_path, fields)
    config = with_batch_that_fits(Config(policy="p", questions="q", dpo={"gradient_checkpointing": "auto"}), tmp_path)
    assert config.dpo.trainer_fields()["gradient_checkpointing"] is True
    assert config.dpo.trainer_fields()["per_device_train_batch_size"] == 2
    remember_smaller_batch(tmp_path, fields | {checkpointing_field(): True})
    smaller = with_batch_that_fits(config, tmp_path).dpo.trainer_fields()
    assert (smaller["per_device_train_batch_size"], smaller["gradient_accumulation_steps"]) == (1, 8)
    assert smaller["gradient_checkpointing"] is True
