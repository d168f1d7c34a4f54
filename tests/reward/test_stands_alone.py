"""`reward` is a package of its own: what importing all of it brings along, and critics by name."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from reward.critics import CRITICS, make_critic, needs, settings_of
from reward.critics.random import RandomCritic
from reward.errors import RewardError
from reward.judgement import Item
from tests.patience import PATIENCE_S
from tests.reward.judge_models import FunctionModel


def test_reward_imports_neither_torch_nor_align_nor_transformers():
    code = (
        "import pkgutil, sys, reward\n"
        "for module in pkgutil.walk_packages(reward.__path__, 'reward.'): __import__(module.name)\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'torch', 'align', 'transformers', 'trl', 'PIL'}), 'reward.critics.panel' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout.strip() == "[] True", done.stderr


def test_every_critic_can_be_made_by_its_name(tmp_path):
    judge_model, scorer = FunctionModel(row=lambda turn: [-0.1, -0.2]), lambda dialogues: [0.0] * len(dialogues)
    (tmp_path / "empty.jsonl").touch()
    file = {"file": str(tmp_path / "empty.jsonl")}
    needed = {
        "panel": {"critics": {"only": {"kind": "random"}}},
        "python": {"function": lambda question, images, responses: [0.0] * len(responses)},
        "scores": file,
        "ratings": file,
    }
    for kind, made in CRITICS.items():
        settings = needed.get(kind, {})
        assert isinstance(make_critic(kind, settings, judge_model=judge_model, scorer=scorer), made)
        assert needs(kind) in (None, "judge_model", "scorer", "critics")


def test_an_unknown_critic_or_setting_is_named_with_its_neighbour():
    with pytest.raises(RewardError, match=r"'pairwse' \(did you mean pairwise\?\)"):
        make_critic("pairwse")
    with pytest.raises(RewardError, match=r"no setting 'tolerence' \(did you mean tolerance\?\)"):
        make_critic("verifier", {"tolerence": 0.1})
    with pytest.raises(RewardError, match="no setting 'judge_model'"):
        make_critic("pairwise", {"judge_model": 1})


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("pairwise", {"tie_threshold": "high"}, "tie_threshold: Input should be a valid number, found 'high'"),
        ("pairwise", {"soft": "yes"}, "soft: Input should be a valid boolean, found 'yes'"),
        ("pairwise", {"rounds": 2.5}, "rounds: Input should be a valid integer, found 2.5"),
        (
            "pairwise",
            {"ridge": True, "prompt": 3},
            "prompt: Input should be a valid string, found 3; ridge: Input should be a valid number, found True",
        ),
        (
            "panel",
            {"critics": {"a": {"kind": "random"}}, "weights": [1]},
            "weights: Input should be a valid dictionary, found [1]",
        ),
    ],
)
def test_a_setting_of_the_wrong_type_is_told_before_anything_runs(kind, settings, message):
    with pytest.raises(RewardError, match=re.escape(message)):
        make_critic(kind, settings, judge_model=FunctionModel())


def test_whole_numbers_do_for_numbers():
    assert make_critic("verifier", {"tolerance": 0, "min_iou": 1}).min_iou == 1


def test_what_a_critic_needs_is_said_when_it_is_missing():
    with pytest.raises(RewardError, match="pairwise needs a model to ask"):
        make_critic("pairwise")
    assert settings_of("random") == ["seed"]


def test_random_preferences_depend_on_seed_and_id_alone():
    items = [Item(f"q{place}", "?", (), ("a", "b", "c", "d", "b")) for place in range(200)]
    judged = RandomCritic(seed=1).judge(items)
    assert [j.rewards for j in RandomCritic(seed=1).judge(items[::-1])][::-1] == [j.rewards for j in judged]
    assert [j.rewards for j in RandomCritic(seed=2).judge(items)] != [j.rewards for j in judged]
    assert all(sorted(j.rewards[:4]) == [-6.0, -2.0, 2.0, 6.0] and j.rewards[4] == j.rewards[1] for j in judged)
    # 200 draws of 4: the first place comes best about 50 times; 4.5 standard deviations are 28.
    assert abs(sum(j.rewards[0] == 6.0 for j in judged) - 50) < 28
