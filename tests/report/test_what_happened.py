"""Report, status and card tell what happened, from the manifests, and not what the first align.yaml asked for."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from align.config import build_config
from align.dpo.settings import effective_settings, training_arguments
from align.hub.model_card import write_model_card
from align.report import write_report
from align.report.facts import run_facts
from align.report.read import read_run
from align.run.folder import RunDir
from align.run.outdated import outdated_rounds
from align.status.run_status import run_status
from tests.report.fake_run import FakeRun


def checkpoint(this, weights):
    this.checkpoint.mkdir(parents=True, exist_ok=True)
    (this.checkpoint / "model.safetensors").write_bytes(weights)


def stage(this, name, *, settings=None, inputs=None, outputs=(), counts=None, **more):
    this.path.mkdir(parents=True, exist_ok=True)
    this.manifest.begin(name, settings=settings or {}, inputs=inputs or {}, **more)
    this.manifest.finish(name, outputs=outputs, counts=counts or {})


def trained(run, number, policy, weights, **settings):
    """A round that began with `policy` and left a checkpoint, whose hash is returned."""
    this = run.round(number)
    counts = {"questions": 4, "responses": 12}
    stage(this, "sample", inputs={"policy": policy}, counts=counts)
    stage(this, "score", settings={"critic": {"kind": settings.pop("critic", "random")}})
    checkpoint(this, weights)
    stage(this, "dpo", settings={"dpo": settings}, inputs={"policy": policy}, outputs=[this.checkpoint])
    return this.manifest.stage("dpo").outputs["checkpoint"]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "policy").mkdir()
    return build_config(
        {"name": "run", "policy": "./policy", "questions": "q.jsonl", "critic": {"kind": "pairwise", "model": "./c"}},
        base=tmp_path,
    )


@pytest.fixture
def three(config):
    """A run of three rounds, each of which began with the checkpoint of the one before."""
    run = RunDir(config.run_dir)
    first = trained(run, 1, "f" * 64, b"one")
    second = trained(run, 2, first, b"two")
    trained(run, 3, second, b"three")
    for number in (1, 2, 3):
        write_model_card(config, number)
    return run


def redo_dpo(run, number, weights):
    run.round(number).discard("dpo")
    checkpoint(run.round(number), weights)
    stage(run.round(number), "dpo", outputs=[run.round(number).checkpoint])


def test_rounds_in_a_chain_are_not_outdated(three):
    assert outdated_rounds(three.rounds()) == {}
    assert "no longer exists" not in (three.round(3).checkpoint / "README.md").read_text()


def test_after_a_redo_of_an_earlier_round_status_report_and_card_name_the_later_ones(three, config):
    redo_dpo(three, 1, b"other weights")
    gone = "is built on a checkpoint of round 1 that no longer exists"
    assert outdated_rounds(three.rounds()) == {2: gone, 3: f"is built on round 2, which itself {gone}"}
    warnings = run_status(three.path).warnings
    assert f"round 2: The round before was done again. Round 2 {gone}." in warnings
    assert any(warning.startswith("round 3: ") and gone in warning for warning in warnings)
    assert run_status(three.path).next_command == "align sample --round 2 --redo"
    assert gone in write_report(three.path).read_text()
    write_model_card(config, 1)
    assert gone in (three.round(2).checkpoint / "README.md").read_text()
    assert gone in (three.round(3).checkpoint / "README.md").read_text()
    assert gone not in (three.round(1).checkpoint / "README.md").read_text()


def test_a_redo_that_gives_the_same_checkpoint_outdates_nothing(three):
    redo_dpo(three, 1, b"one")
    assert outdated_rounds(three.rounds()) == {}


def test_a_round_whose_parent_is_being_done_again_is_outdated(three):
    three.round(2).discard("dpo")
    assert list(outdated_rounds(three.rounds())) == [3]
    assert run_status(three.path).next_command == "align run"


def test_facts_are_those_of_the_manifests(config):
    run = RunDir(config.run_dir)
    run.write_config_once("policy: ./policy\nquestions: q.jsonl\nrounds: 2\ncritic: {kind: pairwise, model: ./c}\n")
    parent = "f" * 64
    for number, critic in enumerate(("random", "random", "pairwise"), start=1):
        parent = trained(run, number, parent, bytes([number]), critic=critic)
    facts = dict(run_facts(read_run(run.path)))
    assert facts["Critic"].startswith("random (rounds 1 to 2), pairwise (")
    assert facts["Rounds"] == "3"
    assert facts["Responses per question"] == "3"


def test_a_run_on_existing_pairs_has_no_critic_and_samples_nothing(config):
    run = RunDir(config.run_dir)
    run.write_config_once("policy: ./policy\npairs_file: p.jsonl\nrounds: 1\n")
    stage(run.round(1), "pairs", inputs={"pairs_file": "a" * 64}, counts={"pairs": 3})
    facts = dict(run_facts(read_run(run.path)))
    assert facts["Critic"] == "existing preference pairs"
    assert "Responses per question" not in facts


def test_the_card_says_what_was_trained_and_knows_the_parent_of_a_run_on_existing_pairs(config):
    this = RunDir(config.run_dir).round(1)
    stage(this, "pairs", inputs={"pairs_file": "a" * 64}, counts={"pairs": 3})
    checkpoint(this, b"weights")
    stage(
        this,
        "dpo",
        settings={"dpo": {"lora": {"r": 8, "lora_alpha": 16}}},
        inputs={"policy": "b" * 64},
        outputs=[this.checkpoint],
    )
    card = write_model_card(config, 1).read_text()
    assert (
        "DPO trained an adapter (LoRA, rank 8, alpha 16), merged into the weights, on existing preference pairs" in card
    )
    assert "trained the full model" not in card
    assert f"| 1 | `{'b' * 16}` |" in card


def test_the_card_shows_the_training_settings_in_effect(config):
    this = RunDir(config.run_dir).round(1)
    checkpoint(this, b"weights")
    this.manifest.begin("dpo", settings={"dpo": {}}, inputs={"policy": "b" * 64})
    effective = effective_settings(
        training_arguments({"output_dir": str(this.trainer), "use_cpu": True, "bf16": False})
    )
    assert {"adam_beta2": 0.999, "max_grad_norm": 1.0, "beta": 0.1}.items() <= effective.items()
    this.manifest.finish("dpo", outputs=[this.checkpoint], counts={}, training=effective)
    card = write_model_card(config, 1).read_text()
    assert "In effect, defaults with them:" in card
    assert '"adam_beta2": 0.999' in card


def test_pictures_of_questions_that_were_added_later_are_found_where_the_round_found_them(tmp_path):
    run = FakeRun(tmp_path / "runs" / "mine", skill=(0.5, 0.7), num_held_out=4, num_training=3).build()
    text = re.sub(r"(?m)^(image_root|questions):.*$", "", (run / "align.yaml").read_text())
    (run / "align.yaml").write_text(text + f"pairs_file: {tmp_path / 'elsewhere' / 'pairs.jsonl'}\n")
    data = json.loads((run / "round-1/manifest.json").read_text())
    without = write_report(run, max_held_out=0).read_text().count("data:image/")
    data["stages"]["sample"]["image_root"] = str(tmp_path / "runs" / "images")
    (run / "round-1/manifest.json").write_text(json.dumps(data))
    assert (without, write_report(run, max_held_out=0).read_text().count("data:image/")) == (0, 3)


def test_held_out_images_that_questions_showed_count_by_content_whatever_their_name(tmp_path):
    run = FakeRun(tmp_path / "runs" / "mine", skill=(0.5, 0.7), num_held_out=4, num_training=3).build()
    images = tmp_path / "runs" / "images"
    held_out = sorted(images.glob("held-*.png"))
    assert len({path.read_bytes() for path in held_out}) == 4
    assert "Held-out images were trained on" not in write_report(run).read_text()
    # Noted under other names, as questions of another folder: what they show is the same.
    import hashlib

    noted = {f"other/{i}.png": hashlib.sha256(path.read_bytes()).hexdigest() for i, path in enumerate(held_out[:3])}
    (run / "round-1/images.json").write_text(json.dumps(noted))
    page = write_report(run).read_text()
    assert "Held-out images were trained on" in page
    assert "3 of 4 held-out images also belong to training questions" in page
    Image.new("RGB", (8, 8)).save(held_out[0])
    assert "2 of 4 held-out images" in write_report(run).read_text()
