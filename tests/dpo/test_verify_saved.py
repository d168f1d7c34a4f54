"""What is saved is what was trained: the folder is opened again and compared."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.dpo import save
from align.dpo.check import check_trained
from align.dpo.train import run_dpo
from align.errors import UserError
from align.models.load import load_model
from tests import tiny_models
from tests.dpo.test_train import make_run, round_1, weights


def spoil(monkeypatch, change) -> None:
    """Damage every checkpoint right after it was written, before it is looked at."""
    write = save.save_checkpoint

    def write_badly(model, processor, folder, **rest):
        write(model, processor, folder, **rest)
        change(folder)

    monkeypatch.setattr(save, "save_checkpoint", write_badly)


def other_value(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight"))
    tensors[name] = tensors[name] * 1.001
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_angles(folder):
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    for place in (text, text.get("rope_parameters") or {}):
        if "rope_theta" in place:
            place["rope_theta"] = 77.0
    (folder / "config.json").write_text(json.dumps(config))


def other_norm(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_value, r"down_proj\.weight has other values"),
        (other_angles, "inv_freq, which is computed from config.json, has other values"),
        (other_norm, "the log-probabilities of a pair differ by"),
    ],
)
def test_a_folder_that_opens_as_another_model_is_found_and_removed(tmp_path, monkeypatch, change, message):
    config = make_run(tmp_path, dpo={"num_train_epochs": 1})
    with monkeypatch.context() as patch:
        spoil(patch, change)
        with pytest.raises(UserError, match=f"what was saved is not what was trained: .*{message}"):
            run_dpo(config, 1)
    this = round_1(config)
    assert not this.checkpoint.exists()
    assert not this.manifest.complete("dpo")
    run_dpo(config, 1)
    assert this.manifest.complete("dpo")


def tie(folder):
    """Make a checkpoint one whose vocabulary projection is its embeddings."""
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}
    assert len(kept) == len(tensors) - 1
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
    ],
    ids=["saved head", "saved both", "adapted embeddings"],
)
def test_an_adapter_that_would_untie_weights_is_refused_before_training(tmp_path, lora):
    tiny_models.save_llava_onevision(tmp_path / "policy")
    tie(tmp_path / "policy")
    config = make_run(tmp_path, dpo={"lora": {"r": 2} | lora})
    with pytest.raises(UserError, match="which this model ties to each other"):
        run_dpo(config, 1)
    assert not (round_1(config).path / "manifest.json").exists()


Q = {"target_modules": ["q_proj"]}
REFUSED = {
    "which this model ties to each other": [
        Q | {"modules_to_save": ["language_model"]},
        Q | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        Q | {"trainable_token_indices": [1, 2]},
        Q | {"trainable_token_indices": {"embed_tokens": [1]}},
        {"target_modules": r".*embed_tokens"},
        {"target_parameters": ["lm_head.weight"]},
        {"target_parameters": ["embed_tokens.weight"]},
    ],
    r"no module of this model is called 'lm_heads'; did you mean 'lm_head'": [Q | {"modules_to_save": ["lm_heads"]}],
    "no module of this model is called 'model.lm_head'": [Q | {"modules_to_save": ["model.lm_head"]}],
    "random change of the policy": [Q | {"init_lora_weights": False}],
    "need no data": [Q | {"init_lora_weights": name} for name in ("eva", "corda", "lora_ga", "loftq", "pisa")],
    "cannot be merged": [Q | {"alora_invocation_tokens": [1]}, Q | {"layer_replication": [[0, 2], [1, 2]]}],
    "object of peft's own": [Q | {f"{name}_config": {"a": 1}} for name in ("arrow", "kasa", "eva", "runtime")],
    "nothing would be (trained|changed)": [Q | {"inference_mode": True}, Q | {"lora_alpha": 0}],
    "adapter that was saved": [Q | {"base_model_name_or_path": "Qwen/Qwen2-VL-2B"}, Q | {"peft_type": "IA3"}],
    "expected CAUSAL_LM or nothing": [Q | {"task_type": "SEQ_CLS"}],
    "dpo.lora: missing \\)": [{"target_modules": "(("}],
    "bias: some": [Q | {"bias": "some"}],
    "not found in the base model": [{"target_modules": "nothing"}, Q | {"layers_to_transform": [99]}],
    "dpo.lora": [Q | {"r": number} for number in (0, -1, 2.5, "8")] + [Q | {"lora_dropout": 2.0}],
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """The folder of a run whose policy's vocabulary projection is its embeddings."""
    folder = tmp_path_factory.mktemp("tied")
    tiny_models.save_llava_onevision(folder / "policy")
    tie(folder / "policy")
    return folder


@pytest.mark.parametrize(("message", "lora"), [(message, lora) for message in REFUSED for lora in REFUSED[message]])
def test_an_adapter_that_could_not_be_trained_or_saved_is_refused_by_the_check(tied, message, lora):
    config = make_run(tied, dpo={"lora": {"r": 2} | lora})
    with pytest.raises(UserError, match=message):
        check_trained(config, str(config.policy))


ADMITTED = [
    {"target_modules": "all-linear", "use_dora": True, "bias": "all"},
    {"target_modules": r".*language_model.*\.(q|v)_proj", "modules_to_save": ["multi_modal_projector"]},
    {"target_modules": ["model.language_model.layers.0.self_attn.q_proj"], "task_type": "CAUSAL_LM", "lora_bias": True},
    {"target_parameters": ["mlp.gate_proj.weight"], "init_lora_weights": "gaussian"},
    Q | {"init_lora_weights": "pissa_niter_4", "use_rslora": True, "modules_to_save": ["vision_tower"]},
]


# peft takes the bias of an adapter for a weight of which a part is missing.
@pytest.mark.filterwarnings("ignore:Adapter 'default'. 1 LoRA tensor")
@pytest.mark.parametrize("lora", ADMITTED)
def test_an_adapter_that_is_admitted_is_saved_as_it_was_trained(tied, lora):
    config = make_run(tied, num_pairs=2, name=f"run-{ADMITTED.index(lora)}", dpo={"num_train_epochs": 1, "gradient_accumulation_steps": 1, "lora": {"r": 2} | lora})  # fmt: skip
    check_trained(config, str(config.policy))
    run_dpo(config, 1)
    assert round_1(config).manifest.complete("dpo")
    assert not any("lm_head" in name for name in weights(round_1(config).checkpoint))


def test_a_tied_model_is_saved_tied(tmp_path):
    tiny_models.save_llava_onevision(tmp_path / "policy")
    tie(tmp_path / "policy")
    config = make_run(tmp_path, dpo={"num_train_epochs": 1, "lora": {"r": 2, "target_modules": ["q_proj"]}})
    run_dpo(config, 1)
    assert not any("lm_head" in name for name in weights(round_1(config).checkpoint))


def test_the_whole_vocabulary_projection_may_be_trained_beside_an_adapter_where_it_is_not_tied(tmp_path):
    lora = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    config = make_run(tmp_path, dpo={"lora": lora, "learning_rate": 1e-2})
    run_dpo(config, 1)
    before, after = weights(tmp_path / "policy"), weights(round_1(config).checkpoint)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith("q_proj.weight") or "lm_head" in name}


def test_a_round_that_learns_nothing_ends_with_an_error(tmp_path):
    config = make_run(tmp_path, dpo={"learning_rate": 0.0})
    with pytest.raises(
        UserError, match=r"training has changed nothing: all \d+ tensors are those of the round's policy"
    ):
        run_dpo(config, 1)
    assert not round_1(config).checkpoint.exists()


def test_warm_up_leaves_a_step_to_learn_in(tmp_path, caplog):
    config = make_run(tmp_path, num_pairs=2, dpo={"gradient_accumulation_steps": 8, "num_train_epochs": 1})
    run_dpo(config, 1)
    before, after = weights(tmp_path / "policy"), weights(round_1(config).checkpoint)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    asked = {"gradient_accumulation_steps": 8, "num_train_epochs": 1, "warmup_steps": 5}
    config = make_run(tmp_path, name="asked", num_pairs=2, dpo=asked)
    run_dpo(config, 1)
    after = weights(round_1(config).checkpoint)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert "dpo.warmup_steps is 5, and there are 1 steps: no warm-up, which would take all of them" in caplog.text


def test_a_policy_in_half_precision_is_compared_as_it_is_stored(tmp_path):
    tiny_models.save_llava_onevision(tmp_path / "whole")
    model = load_model(tmp_path / "whole", dtype=torch.bfloat16)
    shutil.copytree(tmp_path / "whole", tmp_path / "policy")
    model.save_pretrained(tmp_path / "policy")
    config = make_run(tmp_path)
    run_dpo(config, 1)
    assert {t.dtype for t in weights(round_1(config).checkpoint).values()} == {torch.bfloat16}
