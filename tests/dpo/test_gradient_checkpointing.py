"""Gradient checkpointing: what is computed again, and that gradients stay the same."""

import pytest
import torch
from peft import LoraConfig

from align.dpo.collator import PairCollator, pair_dataset
from align.dpo.trainer import PairTrainer
from align.media.images import ImageStore
from align.models.modules import freeze_parts
from tests import tiny_models, tiny_vlms
from tests.dpo.conftest import make_args, make_pairs, tokenized

ADAPTER = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def trained(folder, model, processor, *, frozen=("vision",), adapter=None, **fields):
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
