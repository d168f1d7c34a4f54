"""Every round to the Hub: once, with its tag; what fails is counted, said, and tried again, and ends nothing."""

import shutil

import pytest

from align.config import build_config
from align.errors import UserError
from align.hub.each_round import push_rounds
from align.hub.push import push
from align.report.changes import history
from align.report.read import read_run
from align.report.warnings import find_warnings
from align.run.folder import RunDir
from align.run.pushes import pushes_path, read_pushes
from tests.tiny_models import save_llava_onevision


class Hub:
    """What huggingface_hub's client does, in memory: commits and tags; `down` refuses everything."""

    def __init__(self):
        self.endpoint, self.down = "https://hub.example", False
        self.repos, self.commits, self.tags = {}, [], {}

    def create_repo(self, repo, *, private, exist_ok):
        if self.down:
            raise ConnectionError("no route to host")
        self.repos.setdefault(repo, private)

    def upload_folder(self, *, folder_path, repo_id, allow_patterns, commit_message):
        self.commits.append((repo_id, folder_path.parent.name, commit_message))
        return type("Commit", (), {"oid": f"commit-{len(self.commits)}"})

    def delete_tag(self, repo, *, tag):
        from huggingface_hub.errors import RevisionNotFoundError

        if tag not in self.tags:
            raise RevisionNotFoundError.__new__(RevisionNotFoundError)
        del self.tags[tag]

    def create_tag(self, repo, *, tag, revision):
        assert tag not in self.tags
        self.tags[tag] = revision


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    return hub


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_llava_onevision(tmp_path_factory.mktemp("weights") / "checkpoint")


@pytest.fixture
def config(tmp_path, weights):
    """A run with two trained rounds."""
    values = {"policy": "./policy", "questions": "q.jsonl", "rounds": 2, "hub": {"repo": "me/model"}}
    config = build_config(values, base=tmp_path)
    for number in (1, 2):
        this = RunDir(config.run_dir).round(number)
        shutil.copytree(weights, this.checkpoint)
        this.manifest.begin("dpo", settings={}, inputs={})
        this.manifest.finish("dpo", outputs=[], counts={})
    return config


def test_every_round_is_pushed_once_privately_and_tagged(config, hub):
    assert push_rounds(config, 1) == []
    assert push_rounds(config, 2) == []
    assert push_rounds(config, 2) == []
    assert hub.commits == [
        ("me/model", "round-1", "Upload checkpoint round-1"),
        ("me/model", "round-2", "Upload checkpoint round-2"),
    ]
    assert hub.tags == {"round-1": "commit-1", "round-2": "commit-2"}
    assert hub.repos == {"me/model": True}


def test_a_push_that_fails_is_counted_and_said_and_tried_again(config, hub):
    hub.down = True
    (warning,) = push_rounds(config, 1)
    assert "round 1 was not pushed to me/model: " in warning
    assert "cannot be reached" in warning
    assert len(push_rounds(config, 2)) == 2
    run = RunDir(config.run_dir)
    assert {number: len(failures) for number, failures in read_pushes(run).open_failures().items()} == {1: 2, 2: 1}
    data = read_run(run.path)
    (warned,) = [found for found in find_warnings(data, history(data), {}) if found.title == "Not on the Hub"]
    assert [number for number, _ in warned.findings] == [1, 2]
    assert warned.findings[0][1].startswith("2 pushes failed")
    hub.down = False
    assert push_rounds(config, 2) == []
    assert len(hub.commits) == 2
    assert read_pushes(run).open_failures() == {}
    assert len(read_pushes(run).failed) == 3


def test_a_round_that_was_trained_again_is_pushed_again_under_its_tag(config, hub):
    push_rounds(config, 2)
    this = RunDir(config.run_dir).round(2)
    (this.checkpoint / "config.json").write_text((this.checkpoint / "config.json").read_text() + "\n")
    push_rounds(config, 2)
    assert [name for _, name, _ in hub.commits] == ["round-1", "round-2", "round-2"]
    assert hub.tags["round-2"] == "commit-3"


def test_the_last_round_alone_where_that_is_asked_for_and_nothing_without_a_repository(config, hub):
    config.hub.each_round = False
    assert push_rounds(config, 1) == []
    assert hub.commits == []
    push_rounds(config, 2, result=0)
    assert hub.commits == [], "the run results in the first policy"
    push_rounds(config, 2, result=2)
    assert [name for _, name, _ in hub.commits] == ["round-2"]
    config.hub.repo = None
    assert push_rounds(config, 2) == []
    assert len(hub.commits) == 1


def test_a_damaged_record_and_a_bad_name_are_warnings_too(config, hub):
    config.hub.repo = "nobody"
    assert "expected a repository as owner/name" in push_rounds(config, 1)[0]
    pushes_path(RunDir(config.run_dir)).write_text("{")
    assert "the record of pushes is damaged" in push_rounds(config, 1)[0]


def test_a_push_by_hand_has_no_tag(config, hub):
    push(RunDir(config.run_dir).round(1).checkpoint, "me/model")
    assert hub.tags == {}
    with pytest.raises(UserError, match="owner/name"):
        push(RunDir(config.run_dir).round(1).checkpoint, "model")
