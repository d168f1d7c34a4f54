"""Pairs that exist already: what can be trained on is kept, everything else is counted and said with file and line."""

import json

import pytest

from align.data.pairs_file import read_pairs_file
from align.errors import UserError
from align.media.images import ImageStore
from align.records import Pair, read_jsonl
from align.run.folder import RunDir
from align.stages.pairs import run_pairs
from tests.critic_runs import config_of
from tests.data.sources import save_pictures, write_jsonl


def pair(name, chosen="yes", rejected="no", images=("0.png",), parts=1):
    def message(role, *content):
        return [{"role": role, "content": list(content)}]

    prompt = message("user", *[{"type": "image"}] * parts, {"type": "text", "text": "Is it?"})
    answers = {
        side: message("assistant", {"type": "text", "text": text})
        for side, text in (("chosen", chosen), ("rejected", rejected))
    }
    return {"id": name, "images": list(images), "prompt": prompt} | answers


BAD = [
    ('{"id": "torn", "prom', "no valid pair"),
    ('{"id": ' + "[" * 50_000 + "]" * 50_000 + "}", "no valid pair"),
    (json.dumps(pair("deep"))[:-1] + ', "meta": {"a": ' + "[" * 900 + "]" * 900 + "}}", "no valid pair"),
    ('{"id": ' + "9" * 5_000 + "}", "no valid pair"),
    (pair("nul", images=["a\0b.png"]), "image cannot be read"),
    (pair("same", rejected="yes"), "no valid pair"),
    (pair("a"), "id is duplicated"),
    (pair("parts", parts=2), "image parts and images differ"),
    (pair("empty", rejected=" "), "empty response"),
    (pair("gone", images=["gone.png"]), "image cannot be read"),
    (pair("key") | {"chozen": 1}, "no valid pair"),
    (pair("long", images=["x" * 5000]), "image cannot be read"),
    (pair("role") | {"chosen": [{"content": "yes"}]}, "a message without a role or text"),
    (pair("text") | {"chosen": [{"role": "assistant"}]}, "a message without a role or text"),
    (pair("null") | {"chosen": [{"role": "assistant", "content": None}]}, "a message without a role or text"),
    (pair("words") | {"rejected": [{"role": "assistant", "content": ["no"]}]}, "a message without a role or text"),
    (
        pair("video", images=(), parts=0) | {"prompt": [{"role": "user", "content": [{"type": "video"}]}]},
        "a message without a role or text",
    ),
    (
        pair("seen") | {"chosen": [{"role": "assistant", "content": [{"type": "image", "text": None}]}]},
        "a response that is no answer",
    ),
    (pair("asked") | {"rejected": [{"role": "user", "content": "no"}]}, "a response that is no answer"),
    (
        pair("answered", images=()) | {"prompt": [{"role": "assistant", "content": "Hm"}]},
        "the prompt does not end with a question",
    ),
]


def test_bad_lines_are_counted_and_the_rest_goes_on(tmp_path, caplog):
    save_pictures(tmp_path, 1)
    path = write_jsonl(tmp_path / "pairs.jsonl", [pair("a"), *[line for line, _ in BAD], pair("b", images=(), parts=0)])
    pairs, counts = read_pairs_file(path, ImageStore(tmp_path))
    assert [one.id for one in pairs] == ["a", "b"]
    assert sum(counts["dropped_pairs"].values()) == len(BAD)
    for _, reason in BAD:
        assert counts["dropped_pairs"][reason] == sum(why == reason for _, why in BAD)
    places = [message for message in caplog.messages if f"{path}:" in message]
    assert [int(message.split(f"{path}:")[1].split(":")[0]) for message in places] == list(range(2, 2 + len(BAD)))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), "big"])
def test_a_margin_that_is_no_number_is_no_pair(tmp_path, number):
    lines = [pair("a", images=(), parts=0) | {"margin": number}, pair("b", images=(), parts=0)]
    pairs, counts = read_pairs_file(write_jsonl(tmp_path / "pairs.jsonl", lines), ImageStore(tmp_path))
    assert [one.id for one in pairs] == ["b"]
    assert counts["dropped_pairs"] == {"no valid pair": 1}


def test_a_line_that_is_not_utf8_is_left_out_and_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps(pair(name, chosen="café", images=(), parts=0), ensure_ascii=False) for name in ("a", "b", "c")]
    encoded = [line.encode(kind) for line, kind in zip(lines, ("utf-8-sig", "latin-1", "utf-8"), strict=True)]
    path.write_bytes(b"\n".join(encoded))
    pairs, counts = read_pairs_file(path, ImageStore(tmp_path))
    assert [one.id for one in pairs] == ["a", "c"]
    assert counts["dropped_pairs"] == {"not UTF-8 text": 1}


def test_a_run_takes_its_first_pairs_from_the_file(tmp_path):
    save_pictures(tmp_path, 1)
    write_jsonl(tmp_path / "pairs.jsonl", [pair("a"), pair("b")])
    config = config_of(tmp_path, questions=None, pairs_file="pairs.jsonl", rounds=1)
    run_pairs(config, 1)
    this = RunDir(config.run_dir).round(1)
    assert [one.id for one in read_jsonl(this.pairs, Pair)] == ["a", "b"]
    write_jsonl(tmp_path / "pairs.jsonl", [pair("c")])
    with pytest.raises(UserError, match=r"pairs_file was .* and is now"):
        run_pairs(config, 1)


def test_a_file_without_a_usable_pair_is_an_error_with_the_reasons(tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", [pair("a"), pair("b")])
    config = config_of(tmp_path, questions=None, pairs_file="pairs.jsonl", rounds=1)
    with pytest.raises(UserError, match=r"no pair is left: image cannot be read \(2\)"):
        run_pairs(config, 1)
    assert not RunDir(config.run_dir).round(1).pairs.exists()


def test_a_file_of_pairs_feeds_one_round_unless_there_are_questions(tmp_path):
    with pytest.raises(UserError, match="pairs_file without questions is enough for 1 round"):
        config_of(tmp_path, questions=None, pairs_file="pairs.jsonl", rounds=3)
    assert config_of(tmp_path, pairs_file="pairs.jsonl", rounds=3).rounds == 3
    with pytest.raises(UserError, match="questions: required"):
        config_of(tmp_path, questions=None)


def test_lengths_of_given_pairs_are_balanced_by_characters(tmp_path):
    save_pictures(tmp_path, 1)
    sides = [("x" * 80, "y" * 10), ("x" * 20, "y" * 10), ("x" * 10, "y" * 20)]
    write_jsonl(tmp_path / "pairs.jsonl", [pair(str(n), *texts) for n, texts in enumerate(sides)])
    config = config_of(tmp_path, questions=None, pairs_file="pairs.jsonl", rounds=1, pairs={"balance_lengths": 0.1})
    run_pairs(config, 1)
    this = RunDir(config.run_dir).round(1)
    assert [one.id for one in read_jsonl(this.pairs, Pair)] == ["1", "2"]
    counts = json.loads(this.manifest_path.read_text())["stages"]["pairs"]["counts"]
    assert counts["dropped_pairs"] == {"dropped to balance lengths": 1}
    assert (counts["pairs"], counts["mean_log_length_ratio_balanced"]) == (2, 0.0)
