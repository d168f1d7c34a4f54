"""Edits, reorderings and cuts of every file in a run folder end in an equal result, a stage done again or good advice.

The long version is `scripts/damage_runs.py`; its moments in the middle of training and after it are left out here.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from scripts.damage_runs import Moment, make_moments, try_edit
from tests.damage_project import make_damage_project

NUM_EDITS = 60
GROUPS = 6


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> tuple[Path, list[Moment], dict[str, str]]:
    folder = tmp_path_factory.mktemp("damage")
    project = make_damage_project(folder / "project")
    return project, *make_moments(project, folder / "moments", training=False)


@pytest.mark.parametrize("group", range(GROUPS))
def test_every_edit_ends_in_an_equal_result_or_in_advice_that_works(damaged, group):
    project, moments, expected = damaged
    for seed in range(group, NUM_EDITS, GROUPS):
        moment = random.Random(seed).choice(moments)
        outcome = try_edit(project, moment, expected, seed, looks=seed % 10 == 0)
        assert not outcome.fault, f"seed {seed}: {outcome}"
