"""Critics opened from their settings: which models stand behind them."""

from __future__ import annotations

from align.config import build_config
from align.engines.judge import open_critic, plan_critic
from tests import tiny_models


def test_members_with_one_model_and_other_processors_look_at_images_of_their_own_size(tmp_path):
    tiny_models.llava_onevision().save_pretrained(tmp_path / "model")
    tiny_models.llava_onevision_processor().save_pretrained(tmp_path / "model")
    member = {"kind": "pointwise", "model": "./model"}
    members = {"near": member, "far": member | {"processor": {"do_rescale": False}}, "too": member}
    data = {
        "policy": "./model",
        "questions": "q.jsonl",
        "model": {"device": "cpu"},
        "critic": {"kind": "panel", "options": {"critics": members}},
    }
    config = build_config(data, base=tmp_path)
    panel, _ = open_critic(plan_critic(config), config, lambda image: image)
    engines = {name: critic.judge_model for name, critic in panel.critics.items()}
    rescales = {name: engine.prompter.processor.image_processor.do_rescale for name, engine in engines.items()}
    assert rescales == {"near": True, "far": False, "too": True}
    assert engines["near"] is engines["too"]
