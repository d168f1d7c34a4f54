"""The stage as a whole: pairs.jsonl and a checkpoint folder in, a checkpoint folder out."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlavaOnevisionForConditionalGeneration, TrainerCallback
from trl import DPOConfig

from align.config import Config, DpoSettings, build_config
from align.dpo.choose_layout import choose_layout
from align.dpo.collator import PairCollator
from align.dpo.settings import RECIPE, check_fields, training_arguments
from align.dpo.stage import DpoStage
from align.dpo.train import run_dpo
from align.dpo.trainer_checkpoints import last_checkpoint
from align.errors import UserError
from align.hub.model_card import write_model_card
from align.media.images import ImageStore
from align.models.load import load_model, load_processor
from align.models.modules import part_of
from align.records import Pair, read_jsonl, write_jsonl
from align.run.folder import Round, RunDir
from tests import tiny_models
from tests.dpo.conftest import make_pairs, tokenized


def make_run(folder: Path, *, num_pairs: int = 6, dpo: dict[str, Any] | None = None, **fields: Any) -> Config:
    """A run whose round 1 has pairs about images in folder/images, for a tiny checkpoint in folder/policy."""
    (folder / "images").mkdir(exist_ok=True)
    if not (folder / "policy").exists():
        tiny_models.save_llava_onevision(folder / "policy")
    defaults = {"learning_rate": 1e-3, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    data = {"policy": "policy", "questions": "questions.jsonl", "image_root": "images", "dpo": defaults | (dpo or {})}
    config = build_config(data | fields, base=folder)
    this = round_1(config)
    if not this.pairs.exists():
        this.path.mkdir(parents=True)
        write_jsonl(this.pairs, make_pairs(folder / "images", num_pairs))
    return config


def round_1(config: Config) -> Round:
    return RunDir(config.run_dir).round(1)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def history(folder: Path) -> list[dict[str, float]]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


def test_a_round_ends_with_a_checkpoint_in_the_form_of_its_parent(tmp_path):
    config = make_run(tmp_path)
    run_dpo(config, 1)
    this = round_1(config)
    before, after = weights(tmp_path / "policy"), weights(this.checkpoint)
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {
        name: (t.shape, t.dtype) for name, t in after.items()
    }
    assert any(not torch.equal(before[name], after[name]) for name in before)
    load_model(this.checkpoint)
    load_processor(this.checkpoint)
    entry = this.manifest.stage("dpo")
    assert entry.status == "complete"
    assert entry.counts["pairs"] == 6
    assert entry.counts["steps"] == 6
    assert "agree" in entry.notes["shared_prefix"]
    assert len((this.trainer / "metrics.jsonl").read_text().splitlines()) == 6
    assert len(history(this.checkpoint)) == 6
    assert not list(this.trainer.glob("checkpoint-*"))


def test_a_finished_round_is_not_trained_again(tmp_path):
    config = make_run(tmp_path)
    run_dpo(config, 1)
    before = (round_1(config).checkpoint / "model.safetensors").stat().st_mtime_ns
    run_dpo(config, 1)
    assert (round_1(config).checkpoint / "model.safetensors").stat().st_mtime_ns == before


def test_shared_and_plain_prompts_train_the_same_weights(tmp_path):
    trained = {}
    for setting in ("on", "off"):
        config = make_run(tmp_path, name=setting, shared_prefix=setting)
        run_dpo(config, 1)
        trained[setting] = weights(round_1(config).checkpoint)
    start = weights(tmp_path / "policy")
    for name in start:
        if name.endswith("k_proj.bias"):
            # Adding a constant to all keys changes no attention: the true gradient is 0, and Adam amplifies rounding.
            continue
        moved = (trained["off"][name] - start[name]).norm()
        assert (trained["on"][name] - trained["off"][name]).norm() <= 1e-2 * moved + 1e-6, name


class StopAtStep(TrainerCallback):
    """Sends this process SIGTERM in the middle of a step, as a scheduler would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def stop_once(monkeypatch, step: int) -> None:
    """The next training is asked to stop while it does `step` + 1."""
    make_trainer = DpoStage.make_trainer

    def with_signal(self, *args, **named):
        trainer = make_trainer(self, *args, **named)
        trainer.add_callback(StopAtStep(step))
        return trainer

    monkeypatch.setattr(DpoStage, "make_trainer", with_signal)


@pytest.mark.parametrize("dpo", [{}, {"projector_learning_rate_multiplier": 3.0, "freeze": ["vision"]}])
def test_a_run_stopped_by_sigterm_goes_on_to_the_same_weights(tmp_path, monkeypatch, dpo):
    straight = make_run(tmp_path, name="straight", dpo=dpo)
    run_dpo(straight, 1)
    stopped = make_run(tmp_path, name="stopped", dpo=dpo)
    with monkeypatch.context() as patch:
        stop_once(patch, 3)
        with pytest.raises(SystemExit) as exit_:
            run_dpo(stopped, 1)
    assert exit_.value.code == 0
    this = round_1(stopped)
    assert not this.manifest.complete("dpo")
    assert len((this.trainer / "metrics.jsonl").read_text().splitlines()) == 4
    run_dpo(stopped, 1)
    expected, found = weights(round_1(straight).checkpoint), weights(this.checkpoint)
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert history(round_1(straight).checkpoint) == history(this.checkpoint)


def test_a_state_torn_while_it_was_written_is_not_used(tmp_path, monkeypatch):
    config = make_run(tmp_path, dpo={"save_steps": 2, "save_total_limit": 3})
    with monkeypatch.context() as patch:
        stop_once(patch, 4)
        with pytest.raises(SystemExit):
            run_dpo(config, 1)
    this = round_1(config)
    assert {path.name for path in this.trainer.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-5"}
    (this.trainer / "checkpoint-5" / "trainer_state.json").unlink()
    assert last_checkpoint(this.trainer, 1) == this.trainer / "checkpoint-4"
    run_dpo(config, 1)
    assert [entry["step"] for entry in history(this.checkpoint)] == [1, 2, 3, 4, 5, 6]


def test_a_pair_that_does_not_fit_is_refused_with_its_token_counts(tmp_path):
    config = make_run(tmp_path, dpo={"max_length": 85})
    with pytest.raises(
        UserError, match=r"4 of 6 pairs do not fit in 85 tokens(.|\n)*p1: prompt 69, chosen 17, rejected 10 tokens"
    ):
        run_dpo(config, 1)
    config = make_run(tmp_path, dpo={"max_length": 85, "on_too_long": "drop"}, name="drop")
    run_dpo(config, 1)
    counts = round_1(config).manifest.stage("dpo").counts
    assert (counts["pairs"], counts["dropped_too_long"]) == (2, 4)


def test_a_pair_that_the_template_refuses_is_dropped_and_counted(tmp_path):
    config = make_run(tmp_path)
    template = tmp_path / "policy" / "chat_template.jinja"
    refusal = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    template.write_text(refusal + template.read_text())
    this = round_1(config)
    pairs = read_jsonl(this.pairs, Pair)
    pairs[1].prompt = [{"role": "tool", "content": "21"}, *pairs[1].prompt]
    pairs[2].rejected = [{"role": "assistant", "content": "look: <image>"}]
    write_jsonl(this.pairs, pairs)
    run_dpo(config, 1)
    counts = this.manifest.stage("dpo").counts
    assert counts["pairs"] == len(pairs) - 1
    assert counts["dropped"] == {"the chat template cannot write it": 1}
    assert counts["dropped_too_long"] == 0


@pytest.mark.parametrize(
    ("dpo", "message"),
    [
        ({"learning_rat": 1e-3}, "dpo.learning_rat: unknown key .did you mean 'learning_rate'"),
        ({"warmup_ratio": 0.1}, "warmup_steps takes a ratio"),
        ({"output_dir": "x"}, "dpo.output_dir cannot be set: the round's folder"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "TRL refuses the dpo section: .*loss_weights"),
        ({"freeze": ["vison"]}, "no part 'vison'.*nearest: vision"),
        ({"freeze": ["vision", "projector", "language"]}, "leaves nothing to train"),
        ({"lora": {"rank": 4}}, "dpo.lora: .*rank"),
        ({"freeze": ["projector"], "projector_learning_rate_multiplier": 3.0}, "no projector is trained"),
        (
            {"save_only_model": True},
            "dpo.save_only_model cannot be set: a training that was stopped resumes with its opt",
        ),
        ({"label_smoothing": 0.1}, "dpo.label_smoothing has no effect: only the losses aot"),
        ({"ref_model_sync_steps": 2}, "dpo.ref_model_sync_steps has no effect: only sync_ref_model reads it"),
        ({"sync_ref_model": True}, "training cannot begin with this dpo section: You cannot use `sync_ref_model=True`"),
        ({"optim": "adamw_bnb_8bit"}, "training cannot begin .*bitsandbytes"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "training cannot begin .*min_lr"),
        ({"lora": {"r": 2, "target_modules": ["lm_head"]}}, "training cannot begin .*lm_head"),
        ({"loss_type": ["exo_pair"]}, "training cannot begin .*Label smoothing must be greater"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 7},
            "dpo.dataloader_drop_last leaves out all 6 pairs",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, dpo, message):
    with pytest.raises(UserError, match=message):
        run_dpo(make_run(tmp_path, dpo=dpo), 1)


WRONG = {
    "expected true or false": [{"disable_dropout": "no"}, {"gradient_checkpointing": "maybe"}, {"torch_compile": 1}],
    "expected a finite number": [
        {"learning_rate": math.inf}, {"learning_rate": "five"}, {"num_train_epochs": math.inf}, {"beta": math.nan},
        {"warmup_steps": True}, {"neftune_noise_alpha": [5]}, {"weight_decay": "10%"}, {"max_grad_norm": math.nan},
    ],
    "expected a whole number": [{"max_steps": 1.5}, {"dataloader_num_workers": "two"}, {"max_steps": math.inf}],
    "expected a number of at least": [{"dataloader_num_workers": -1}, {"max_grad_norm": -1}, {"weight_decay": -0.1}],
    "expected a number above 0": [{"save_steps": 0}, {"save_steps": -5}],
    "expected a number from 0 to 1": [{"ld_alpha": 5}, {"ld_alpha": -0.1}],
    "none of TRL's: reverse_kl": [{"f_divergence_type": "kl"}],
    "cannot be set": [{"use_liger_kernel": True}, {"push_to_hub": True}],
}  # fmt: skip


@pytest.mark.parametrize(("message", "dpo"), [(message, dpo) for message, cases in WRONG.items() for dpo in cases])
def test_a_value_of_the_wrong_kind_is_refused_before_anything_is_opened(tmp_path, message, dpo):
    def look() -> None:
        check_fields(DpoSettings(**dpo))
        training_arguments(RECIPE | dpo | {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}, dpo)

    with pytest.raises(UserError, match=message):
        look()


def test_numbers_may_be_written_as_text_and_whole_ones_as_floats(tmp_path):
    check_fields(DpoSettings(learning_rate="1e-6", max_steps=1e3, gradient_checkpointing="auto", bf16=None))


def test_pairs_that_cannot_be_used_are_refused(tmp_path):
    config = make_run(tmp_path)
    this = round_1(config)
    pairs = make_pairs(tmp_path / "images", 2)
    write_jsonl(this.pairs, [])
    with pytest.raises(UserError, match="no pair has survived"):
        run_dpo(config, 1)
    write_jsonl(this.pairs, [pairs[0], pairs[0]])
    with pytest.raises(UserError, match="are duplicated, such as 'p0'"):
        run_dpo(config, 1)
    template = tmp_path / "policy" / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}"))
    write_jsonl(this.pairs, pairs)
    with pytest.raises(UserError, match="no pair can be trained on; the first: pair p0: the chat template writes the"):
        run_dpo(config, 1)
    this.pairs.unlink()
    with pytest.raises(UserError, match="there are no pairs"):
        run_dpo(config, 1)


def test_an_adapter_is_merged_into_a_whole_checkpoint(tmp_path):
    config = make_run(tmp_path, dpo={"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}, "learning_rate": 1e-2})
    run_dpo(config, 1)
    before, after = weights(tmp_path / "policy"), weights(round_1(config).checkpoint)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith(("q_proj.weight", "v_proj.weight"))}
    assert not (round_1(config).checkpoint / "adapter_config.json").exists()
    # The adapter alone lies beside it: on the policy it is the checkpoint.
    policy = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(policy, round_1(config).path / "adapter").merge_and_unload()
    named = dict(LlavaOnevisionForConditionalGeneration.from_pretrained(round_1(config).checkpoint).named_parameters())
    for name, weight in adapted.named_parameters():
        assert torch.allclose(weight, named[name], atol=1e-6), name


def test_an_adapter_stopped_by_sigterm_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    dpo = {"lora": {"r": 4, "target_modules": "all-linear"}, "freeze": ["vision", "projector"], "learning_rate": 1e-2}
    straight, stopped = (make_run(tmp_path, name=name, dpo=dpo) for name in ("straight", "stopped"))
    run_dpo(straight, 1)
    with monkeypatch.context() as patch:
        stop_once(patch, 3)
        with pytest.raises(SystemExit):
            run_dpo(stopped, 1)
    run_dpo(stopped, 1)
    expected, found = weights(round_1(straight).checkpoint), weights(round_1(stopped).checkpoint)
    for name in expected:
        assert torch.allclose(expected[name], found[name], atol=1e-6), name
    before = weights(tmp_path / "policy")
    moved = {name for name in before if not torch.equal(before[name], found[name])}
    assert moved
    assert {part_of(name) for name in moved} == {"language"}
    card = write_model_card(stopped, 1).read_text()
    assert "an adapter (LoRA, rank 4, none in vision, projector), merged into the weights" in card


def test_live_and_cached_references_train_the_same(tmp_path):
    curves = {}
    for reference in ("round-start", "live", "initial"):
        config = make_run(tmp_path, name=reference, dpo={"reference": reference})
        run_dpo(config, 1)
        curves[reference] = history(round_1(config).checkpoint)
        assert round_1(config).reference.exists() == (reference != "live")
    # In the first round the first policy is the round's start.
    assert curves["initial"] == curves["round-start"]
    for cached, live in zip(curves["round-start"], curves["live"], strict=True):
        assert cached["loss"] == pytest.approx(live["loss"], abs=1e-4)
        assert cached["rewards/margins"] == pytest.approx(live["rewards/margins"], abs=1e-4)


def test_the_second_round_starts_from_the_first_and_may_refer_to_the_first_policy(tmp_path):
    config = make_run(tmp_path, dpo={"reference": "initial", "gradient_accumulation_steps": 1})
    run_dpo(config, 1)
    second = RunDir(config.run_dir).round(2)
    second.path.mkdir()
    write_jsonl(second.pairs, make_pairs(tmp_path / "images", 4))
    run_dpo(config, 2)
    first_step = history(second.checkpoint)[0]
    assert abs(first_step["rewards/margins"]) > 1e-3
    assert second.manifest.stage("dpo").inputs["reference"] == round_1(config).manifest.stage("dpo").inputs["policy"]


def test_a_loss_that_is_no_number_stops_at_the_last_good_state(tmp_path, monkeypatch):
    config = make_run(tmp_path, dpo={"gradient_accumulation_steps": 1, "num_train_epochs": 1})
    make_trainer = DpoStage.make_trainer

    def spoil(module, inputs, output):
        output.last_hidden_state = output.last_hidden_state * float("nan")
        return output

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **_):
            if state.global_step == 2:
                # The weights stay good; what they compute does not.
                model.model.register_forward_hook(spoil)

    def with_poison(self, *args, **named):
        trainer = make_trainer(self, *args, **named)
        trainer.add_callback(Poison())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(DpoStage, "make_trainer", with_poison)
        with pytest.raises(
            UserError, match=r"the loss is nan at step 3, with the pairs p\d; the state after step 2 is kept"
        ):
            run_dpo(config, 1)
    state = round_1(config).trainer / "checkpoint-2"
    assert all(torch.isfinite(tensor).all() for tensor in weights(state).values())
    run_dpo(config, 1)
    assert [entry["step"] for entry in history(round_1(config).checkpoint)] == [1, 2, 3, 4, 5, 6]


def test_a_gradient_that_is_no_number_stops_before_the_weights_are_touched(tmp_path, monkeypatch):
    config = make_run(tmp_path, dpo={"gradient_accumulation_steps": 2, "num_train_epochs": 1})
    make_trainer = DpoStage.make_trainer

    def with_bad_gradient(self, *args, **named):
        trainer = make_trainer(self, *args, **named)
        trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
        return trainer

    monkeypatch.setattr(DpoStage, "make_trainer", with_bad_gradient)
    with pytest.raises(
        UserError, match=r"the norm of the gradient is nan at step 1, with the pairs p\d, p\d; nothing has"
    ):
        run_dpo(config, 1)


def test_a_shared_prefix_that_is_not_exact_is_refused_or_replaced(tmp_path):
    class Twisted(torch.nn.Module):
        """An attention output that depends on how the row is laid out, as a state-space layer's would."""

        def forward(self, hidden):
            return hidden + hidden.cumsum(dim=1) * 0.01

    model = tiny_models.llava_onevision()
    processor = tiny_models.llava_onevision_processor()
    (tmp_path / "images").mkdir()
    store = ImageStore(tmp_path / "images")
    pairs = tokenized(make_pairs(tmp_path / "images", 1), processor, store)
    collator = PairCollator(processor, store, "shared")
    model.model.language_model.norm = torch.nn.Sequential(Twisted(), model.model.language_model.norm)
    layout, note = choose_layout("auto", model, collator, pairs)
    assert layout == "plain"
    assert re.match("not used: (shared and unshared log-probabilities differ|the check cannot tell)", note)
    with pytest.raises(UserError, match="shared_prefix is on, but it cannot be used"):
        choose_layout("on", model, collator, pairs)


def test_pairs_may_be_grouped_by_length(tmp_path):
    if "train_sampling_strategy" not in {field.name for field in dataclasses.fields(DPOConfig)}:
        pytest.skip("this transformers has another name for it")
    grouped = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2, "num_train_epochs": 1}
    config = make_run(tmp_path, num_pairs=8, dpo=grouped)
    run_dpo(config, 1)
    assert round_1(config).manifest.stage("dpo").counts["steps"] == 2
