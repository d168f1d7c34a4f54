"""Scoring a round: which critic is made of which settings, what is measured of it, and gates that stop."""

import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from align.errors import UserError
from align.records import read_jsonl
from align.run.folder import RunDir
from align.stages.pairs import run_pairs
from align.stages.score import run_score
from reward.judgement import Judgement
from tests.critic_runs import (
    NUM_QUESTIONS,
    TEXTS,
    config_of,
    save_always_first,
    save_blind,
    save_seeing,
    score,
    score_counts,
    score_lines,
    write_round,
)
from tests.tiny_models import byte_tokenizer

SHORT = {"kind": "pairwise", "prompt": "pairwise_short"}


@pytest.fixture(scope="module")
def critics(tmp_path_factory):
    folder = tmp_path_factory.mktemp("critics")
    save_always_first(folder / "first")
    save_blind(folder / "blind")
    save_seeing(folder / "seeing")
    return folder


@pytest.fixture
def folder(tmp_path):
    write_round(tmp_path)
    return tmp_path


def test_a_critic_that_always_prefers_the_first_is_measured_as_that(folder, critics):
    found = score(folder, **SHORT, model=str(critics / "first"))["critic"]
    assert found["position_bias"]["value"] == 1.0
    assert found["consistency"]["value"] == 0.0
    assert found["image_dependence"]["value"] == 0.0
    # Both orders summed, it prefers nothing at all.
    assert {reward for line in score_lines(folder) for reward in line.rewards} == {0.0}


def test_a_critic_that_ignores_the_image_is_caught_by_both_controls_and_one_that_looks_is_not(tmp_path, critics):
    found = {}
    for name in ("blind", "seeing"):
        write_round(tmp_path / name)
        found[name] = score(tmp_path / name, kind="pointwise", model=str(critics / name))["critic"]
    blind, seeing = ([found[name][f"image_dependence_{way}"] for way in ("blank", "shuffled")] for name in found)
    assert [figure["value"] for figure in blind] == [0.0, 0.0]
    assert seeing[0]["value"] > 0.1
    assert seeing[1]["value"] > 0.05
    pairs = len(TEXTS) * (len(TEXTS) - 1) // 2
    assert [figure["questions"] for figure in seeing] == [NUM_QUESTIONS] * 2
    assert [figure["count"] for figure in seeing] == [NUM_QUESTIONS * pairs] * 2
    assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in (*blind, *seeing))
    assert blind[0]["high"] > 0.1  # of four questions, nothing is not known to be nothing


def test_a_gate_stops_with_the_scores_kept_and_other_gates_go_on_without_judging_again(folder, critics):
    settings = {**SHORT, "model": str(critics / "first")}
    gates = {"max_position_bias": 0.3, "min_image_dependence": 0.1}
    with pytest.raises(
        UserError,
        match=r"position_bias is 1 \(24 pairs judged in both orders\), allowed at most 0.3.*image_dependence is 0",
    ):
        score(folder, **settings, gates=gates)
    scores = RunDir(folder / "runs/run").round(1).scores
    assert len(score_lines(folder)) == NUM_QUESTIONS
    before = scores.stat().st_mtime_ns
    config = config_of(folder, critic={**settings, "gates": gates})
    for stage in (run_score, run_pairs):
        with pytest.raises(UserError, match="does not pass its gates"):
            stage(config, 1)
    run_score(config_of(folder, critic={**settings, "gates": {"max_position_bias": 1.0}}), 1)
    assert scores.stat().st_mtime_ns == before


def test_a_gate_that_names_no_measure_is_told_before_anything_is_judged(folder, critics):
    with pytest.raises(UserError, match="did you mean max_position_bias"):
        score(folder, **SHORT, model=str(critics / "first"), gates={"max_positon_bias": 0.3})
    assert not RunDir(folder / "runs/run").round(1).scores.exists()


def test_the_controls_are_left_out_where_nobody_looks_or_where_they_are_switched_off(tmp_path, critics):
    write_round(tmp_path / "rule", answers=True)
    assert "image_dependence" not in score(tmp_path / "rule", kind="verifier")["critic"]
    write_round(tmp_path / "off")
    counts = score(tmp_path / "off", **SHORT, model=str(critics / "first"), reliability_sample=0)
    assert "image_dependence" not in counts["critic"]
    assert not RunDir(tmp_path / "off" / "runs/run").round(1).controls.exists()


def test_only_as_many_questions_as_asked_for_are_judged_again(folder, critics):
    found = score(folder, **SHORT, model=str(critics / "first"), reliability_sample=2)["critic"]
    assert found["image_dependence_blank"]["questions"] == 2
    controls = read_jsonl(RunDir(folder / "runs/run").round(1).controls, Judgement)
    assert sorted(line.id.split(":")[0] for line in controls) == ["blank", "blank", "shuffled", "shuffled"]


def test_a_scoring_that_stopped_before_the_controls_judges_no_question_twice(folder, critics):
    config = config_of(folder, critic={**SHORT, "model": str(critics / "seeing")})
    run_score(config, 1)
    this = RunDir(folder / "runs/run").round(1)
    whole = this.scores.read_text()
    entry = json.loads(this.manifest_path.read_text())
    entry["stages"]["score"]["status"] = "running"
    del entry["checksum"]
    this.manifest_path.write_text(json.dumps(entry))
    lines = whole.splitlines(keepends=True)
    changed = json.loads(lines[0])
    changed["evidence"]["kept"] = True
    this.scores.rename(this.path / "scores.part-0.jsonl")
    (this.path / "scores.part-0.jsonl").write_text(json.dumps(changed) + "\n" + "".join(lines[1:4]))
    this.controls.unlink()
    run_score(config, 1)
    assert score_lines(folder)[0].evidence["kept"] is True
    assert this.scores.read_text().splitlines(keepends=True)[1:] == lines[1:]


def test_agreement_with_reference_answers_is_measured_where_there_are_any(tmp_path, critics):
    write_round(tmp_path, answers=True)
    found = score(tmp_path, kind="pointwise", model=str(critics / "seeing"))["critic"]
    # By hand: of the three pairs per question that set "It is 7." against a wrong text, those it wins.
    right = TEXTS.index("It is 7.")
    won = [
        line.rewards[right] > reward
        for line in score_lines(tmp_path)
        for i, reward in enumerate(line.rewards)
        if i != right
    ]
    assert found["agreement_with_reference"]["value"] == pytest.approx(sum(won) / len(won), abs=1e-4)
    assert found["agreement_with_reference"]["questions"] == NUM_QUESTIONS


def test_a_panel_of_rule_and_model_weighs_both_and_its_members_may_bring_models_of_their_own(tmp_path, critics):
    write_round(tmp_path, answers=True)
    members = {
        "rule": {"kind": "verifier"},
        "looks": {"kind": "pointwise", "model": str(critics / "seeing")},
        "shared": {"kind": "pairwise", "prompt": "pairwise_short"},
    }
    found = score(tmp_path, kind="panel", model=str(critics / "blind"), options={"critics": members})["critic"]
    line = score_lines(tmp_path)[0]
    assert set(line.evidence["members"]) == {"rule", "looks", "shared"}
    assert line.evidence["correct"] == [text == "It is 7." for text in TEXTS]
    assert 0 <= found["agreement_between_critics"]["value"] <= 1
    stage = RunDir(tmp_path / "runs/run").round(1).manifest.stage("score")
    assert {"critic", "critic looks"} <= set(stage.inputs)


def test_a_member_without_any_model_is_named(folder):
    members = {"rule": {"kind": "verifier"}, "looks": {"kind": "pointwise"}}
    with pytest.raises(UserError, match="needs a model for member looks"):
        score(folder, kind="panel", options={"critics": members})


def test_written_judgements_are_kept_as_rationales(folder, critics):
    options = {"read": "text", "max_new_tokens": 8}
    score(folder, **SHORT, model=str(critics / "first"), options=options, reliability_sample=0)
    verdicts = [verdict for line in score_lines(folder) for verdict in line.verdicts]
    assert {verdict.rationale for verdict in verdicts} == {"first"}
    assert all(verdict.winner == verdict.first for verdict in verdicts)


def test_judgements_that_cannot_be_read_are_unscored_and_the_stage_says_why(folder, critics):
    options = {"read": "text", "max_new_tokens": 4}
    with pytest.raises(UserError, match="could score none of 4 questions: the critic's answer could not be read"):
        score(folder, kind="pointwise", model=str(critics / "first"), options=options)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A text-only reward model that counts nothing sensible, but the same every time."""
    folder = tmp_path_factory.mktemp("reward-model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=1
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_text_only_reward_model_scores_and_says_that_it_sees_nothing(folder, reward_model):
    found = score(folder, kind="scalar", model=str(reward_model))["critic"]
    rewards = [reward for line in score_lines(folder) for reward in line.rewards]
    assert len(set(rewards)) > NUM_QUESTIONS
    assert found["image_dependence"]["value"] == 0.0
    stage = RunDir(folder / "runs/run").round(1).manifest.stage("score")
    assert "text only" in stage.notes["images"]


def test_a_reward_model_scores_a_dialogue_alike_alone_and_in_a_batch(reward_model):
    from align.config import ModelSettings
    from align.engines.reward_model import open_scorer
    from reward.critics.scalar import Dialogue

    scorer = open_scorer(str(reward_model), ModelSettings(dtype="float32"), open_image=lambda image: image)
    dialogues = [Dialogue((), "What is it?", text) for text in TEXTS]
    assert scorer(dialogues) == pytest.approx([scorer([dialogue])[0] for dialogue in dialogues], abs=1e-5)


def test_a_reward_is_read_at_the_end_of_a_dialogue_also_without_a_padding_token(reward_model, tmp_path):
    from align.config import ModelSettings
    from align.engines.reward_model import open_scorer
    from reward.critics.scalar import Dialogue

    shutil.copytree(reward_model, tmp_path, dirs_exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token, end = None, tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    scorer = open_scorer(str(tmp_path), ModelSettings(dtype="float32"), open_image=lambda image: image)
    dialogues = [Dialogue((), "What is it?", text + end) for text in TEXTS]
    texts = [scorer._render(dialogue) for dialogue in dialogues]
    ids = [scorer.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in texts]
    hidden = [scorer.model.model(row).last_hidden_state[0, -1] for row in ids]
    assert scorer(dialogues) == pytest.approx([scorer.model.score(last).item() for last in hidden], abs=1e-5)


def test_a_reward_model_with_two_outputs_is_refused(folder, tmp_path):
    config = LlamaConfig(
        vocab_size=264, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=2
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "two")
    byte_tokenizer().save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="expected a reward model with one output, found 2"):
        score(folder, kind="scalar", model=str(tmp_path / "two"))


def test_a_random_control_has_no_controls_of_its_own(folder):
    score(folder, kind="random")
    assert "image_dependence" not in score_counts(folder)["critic"]
