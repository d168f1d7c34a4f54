import json
import multiprocessing

import pytest

from align.config import build_config
from align.errors import UserError
from align.records import Question, Response, Samples
from align.run.folder import RunDir
from align.run.hashes import content_hash
from align.run.manifest import Manifest
from align.run.parents import starts_from
from align.run.resumable import PartialFile, drop_changed
from tests.patience import PATIENCE_S


def question(number):
    return Question(id=f"q{number}", question="What?")


def test_parts_are_merged_in_the_wanted_order_and_removed(tmp_path):
    final = tmp_path / "samples.jsonl"
    PartialFile(final, Question, rank=1).append(question(1))
    part = PartialFile(final, Question, rank=0)
    part.append(question(2))
    part.append(question(0))
    assert [q.id for q in part.finish(["q0", "q1", "q2"])] == ["q0", "q1", "q2"]
    assert [json.loads(line)["id"] for line in final.read_text().splitlines()] == ["q0", "q1", "q2"]
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


def test_a_torn_last_line_is_done_again(tmp_path):
    part = PartialFile(tmp_path / "samples.jsonl", Question)
    part.append(question(0))
    with part.path.open("a") as file:
        file.write('{"id": "q1", "ques')
    assert set(part.read()) == {"q0"}
    part.append(question(1))
    assert set(part.read()) == {"q0", "q1"}


def test_a_stage_goes_on_with_the_same_settings_only(tmp_path):
    manifest = Manifest(tmp_path / "manifest.json")
    assert manifest.begin("sample", settings={"sample": {"temperature": 0.7}}, inputs={"questions": "abc"})
    assert manifest.begin("sample", settings={"sample": {"temperature": 0.7}}, inputs={"questions": "abc"})
    with pytest.raises(UserError, match=r"sample\.temperature was 0\.7 and is now 0\.9.*--redo"):
        manifest.begin("sample", settings={"sample": {"temperature": 0.9}}, inputs={"questions": "abc"})
    with pytest.raises(UserError, match="questions was abc and is now abd"):
        manifest.begin("sample", settings={"sample": {"temperature": 0.7}}, inputs={"questions": "abd"})


def test_a_finished_stage_does_nothing_more(tmp_path):
    output = tmp_path / "samples.jsonl"
    output.write_text("x")
    manifest = Manifest(tmp_path / "manifest.json")
    manifest.begin("sample", settings={}, inputs={})
    assert not manifest.complete("sample")
    manifest.finish("sample", outputs=[output], counts={"questions": 1}, seconds=1.5)
    assert manifest.complete("sample")
    assert not manifest.begin("sample", settings={}, inputs={})
    entry = manifest.stage("sample")
    assert entry.outputs == {"samples.jsonl": content_hash(output)}
    assert entry.counts == {"questions": 1}
    assert "torch" in entry.versions


def test_forgetting_a_stage_forgets_the_later_ones(tmp_path):
    round_ = RunDir(tmp_path).round(1)
    for stage in ("sample", "score", "dpo"):
        round_.manifest.begin(stage, settings={}, inputs={})
        round_.manifest.finish(stage, outputs=[], counts={}, seconds=0)
    round_.samples.write_text("")
    round_.pairs.write_text("")
    round_.checkpoint.mkdir()
    round_.discard("score")
    assert round_.manifest.complete("sample")
    assert not round_.manifest.complete("dpo")
    assert round_.samples.exists()
    assert not round_.pairs.exists()
    assert not round_.checkpoint.exists()


def test_a_round_needs_the_one_before(tmp_path):
    run = RunDir(tmp_path)
    config = build_config({"policy": "first", "questions": "q.jsonl"}, base=tmp_path)
    assert starts_from(config, run, 1) == 0
    assert run.checkpoint(0, "first") == "first"
    with pytest.raises(UserError, match=r"round 2 has no complete dpo stage.*align dpo --round 2"):
        starts_from(config, run, 3)
    run.round(2).manifest.begin("dpo", settings={}, inputs={})
    with pytest.raises(UserError, match="no complete dpo"):
        run.checkpoint(2, "first")
    run.round(2).manifest.finish("dpo", outputs=[], counts={}, seconds=0)
    assert starts_from(config, run, 3) == 2
    assert run.checkpoint(2, "first") == str(run.round(2).checkpoint)


def _hold(path, ready, release):
    with RunDir(path).round(1).lock():
        ready.set()
        release.wait(PATIENCE_S)


def test_a_second_process_is_refused_with_the_holder_named(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready, release))
    process.start()
    assert ready.wait(PATIENCE_S)
    with pytest.raises(UserError, match=f"in use by process {process.pid} on "), RunDir(tmp_path).round(1).lock():
        pass
    release.set()
    process.join()
    with RunDir(tmp_path).round(1).lock():
        pass


def test_the_content_hash_of_a_checkpoint_ignores_cards_and_names(tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "README.md").write_text(name)
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"other")
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "b")


def test_what_is_finished_stays_finished_whatever_its_text_holds(tmp_path):
    # U+2028 and U+0085 end a line for Python's splitlines; NaN is not equal to itself.
    asked = [
        Question(id="q0", question="What\u2028is\u0085it?"),
        Question(id="q1", question="Why?", meta={"score": float("nan")}),
    ]
    done = [
        Samples(id=one.id, question=one, responses=[Response(text="A\u2029b", num_tokens=1)], seed=0) for one in asked
    ]
    final = tmp_path / "samples.jsonl"
    part = PartialFile(final, Samples)
    for line in done:
        part.append(line)
    part.finish(["q0", "q1"])
    part.reopen()
    assert set(part.read()) == {"q0", "q1"}
    assert drop_changed(part, asked, []) == set()
    assert [line.responses for line in part.finish(["q0", "q1"])] == [line.responses for line in done]
    part.reopen()
    assert drop_changed(part, [asked[0], asked[1].model_copy(update={"question": "Who?"})], []) == {"q1"}
