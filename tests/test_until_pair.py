"""Further responses to questions whose first ones cannot make a pair: which, how many, counted, and always the same ones."""

import json
import shutil

import pytest

from align.config import load_config
from align.demo.data import write_demo
from align.errors import UserError
from align.stages.sample import check_settings, run_sample
from align.stages.until_pair import can_make_pair

SETTINGS = [
    "sample.num_responses=2",
    "sample.temperature=0.2",
    "sample.until_pair=true",
    "sample.max_responses=7",
    "sample.further_temperature=1.2",
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The demo's policy and a few of its questions, sampled with `until_pair`."""
    folder = tmp_path_factory.mktemp("until-pair")
    write_demo(folder, num_questions=12, num_eval=4, seed=0)
    run_sample(load_config(folder / "align.yaml", SETTINGS), 1)
    return folder


def samples_of(folder):
    text = (folder / "runs/critic/round-1/samples.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def counts_of(folder):
    manifest = json.loads((folder / "runs/critic/round-1/manifest.json").read_text())
    return manifest["stages"]["sample"]["counts"]


def paired(responses):
    return can_make_pair((response["text"], response.get("finish_reason", "stop")) for response in responses)


def test_only_questions_without_two_different_responses_get_further_ones_and_all_are_counted(project):
    samples = samples_of(project)
    further = [line for line in samples if len(line["responses"]) > 2]
    assert 0 < len(further) < len(samples)
    assert not any(paired(line["responses"][:2]) for line in further)
    assert all(paired(line["responses"][:2]) for line in samples if line not in further)
    without = [line for line in samples if not paired(line["responses"])]
    assert all(len(line["responses"]) == 7 for line in without)
    assert len(without) < len(further)
    counts = counts_of(project)
    assert counts["questions_with_further_responses"] == len(further)
    assert counts["further_responses"] == sum(len(line["responses"]) - 2 for line in further)
    assert counts["questions_without_two_different"] == len(without)


def test_what_was_killed_ends_as_what_was_not_and_the_batch_does_not_count(project, tmp_path):
    folder = shutil.copytree(project, tmp_path / "project")
    this = folder / "runs/critic/round-1"
    expected = (this / "samples.jsonl").read_text()
    manifest = json.loads((this / "manifest.json").read_text())
    del manifest["checksum"]
    manifest["stages"]["sample"]["status"] = "running"
    (this / "manifest.json").write_text(json.dumps(manifest))
    (this / "samples.jsonl").unlink()
    (this / "samples.part-0.jsonl").write_text("".join(expected.splitlines(keepends=True)[3:8]) + '{"id": "torn')
    run_sample(load_config(folder / "align.yaml", [*SETTINGS, "sample.batch_size=2"]), 1)
    assert (this / "samples.jsonl").read_text() == expected


def test_a_round_without_further_responses_is_what_it_was_before_there_were_any(project, tmp_path):
    folder = shutil.copytree(project, tmp_path / "project", ignore=shutil.ignore_patterns("runs"))
    run_sample(load_config(folder / "align.yaml", SETTINGS[:2]), 1)
    plain, further = samples_of(folder), samples_of(project)
    assert [line["responses"] for line in plain] == [line["responses"][:2] for line in further]
    manifest = json.loads((folder / "runs/critic/round-1/manifest.json").read_text())
    assert "until_pair" not in manifest["stages"]["sample"]["settings"]["sample"]


def test_further_responses_are_drawn_at_their_own_temperature_and_the_first_ones_are_not(project, tmp_path):
    folder = shutil.copytree(project, tmp_path / "project", ignore=shutil.ignore_patterns("runs"))
    # So low that every further response is the likeliest one.
    run_sample(load_config(folder / "align.yaml", [*SETTINGS[:-1], "sample.further_temperature=0.001"]), 1)
    cold, warm = ({line["id"]: line["responses"] for line in samples_of(where)} for where in (folder, project))
    for id_, responses in cold.items():
        assert responses[:2] == warm[id_][:2]
        assert len({response["text"] for response in responses[2:]}) <= 1
    assert any(len({response["text"] for response in responses[2:]}) > 1 for responses in warm.values())
    assert counts_of(folder)["questions_without_two_different"] > counts_of(project)["questions_without_two_different"]


def test_nothing_further_to_draw_is_refused(project):
    config = load_config(project / "align.yaml", ["sample.until_pair=true", "sample.max_responses=5"])
    with pytest.raises(UserError, match=r"max_responses \(5\) is not above num_responses \(5\)"):
        check_settings(config)
