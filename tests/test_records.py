import json

import pytest

from align.errors import UserError
from align.records import (
    Pair,
    Question,
    Response,
    Samples,
    iter_jsonl,
    parse_line,
    read_jsonl,
    read_questions,
    to_line,
    write_jsonl,
)
from align.run.resumable import PartialFile
from reward.judgement import Judgement


def test_images_without_tags_stand_before_the_first_user_turn():
    question = Question(
        id="q",
        question="And now?",
        images=["a", "b"],
        history=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    )
    messages = question.messages()
    assert [part["type"] for part in messages[0]["content"]] == ["image", "image", "text"]
    assert [part["type"] for part in messages[2]["content"]] == ["text"]


def test_image_tags_in_the_text_keep_their_places():
    parts = Question(id="q", question="Compare <image> with <image>.", images=["a", "b"]).messages()[0]["content"]
    assert [part.get("text", "<image>") for part in parts] == ["Compare ", "<image>", " with ", "<image>", "."]


def test_tags_that_do_not_match_the_images_are_refused():
    with pytest.raises(UserError, match="1 <image> but there are 2 images"):
        parse_line('{"id": "q", "question": "<image>?", "images": ["a", "b"]}', Question, "f:1")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "q", "question": "?"', "questions.jsonl:2: not valid JSON"),
        ("[1]", "questions.jsonl:2: expected a JSON object, found list"),
        ('{"id": "q", "question": "  "}', "questions.jsonl:2: .*the question is empty"),
        ('{"id": "q", "question": "?", "image": ["a"]}', r"unknown key 'image' \(did you mean 'images'\?\)"),
        (r'{"id": "q", "question": "caf\udce9?"}', r"questions.jsonl:2: .*half of a character \(\\udce9\)"),
        (r'{"id": "q", "question": "?", "answer": "\ud83d"}', r"questions.jsonl:2: .*half of a character \(\\ud83d\)"),
        ('{"id": "", "question": "?"}', "questions.jsonl:2: .*id"),
        ('{"question": "?"}', "questions.jsonl:2: .*id: Field required"),
    ],
)
def test_a_bad_line_names_file_line_and_fault(tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"id": "ok", "question": "What?"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        list(iter_jsonl(path, Question))


def test_duplicate_ids_and_empty_files_are_refused(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"id": "a", "question": "What?"}\n' * 2)
    with pytest.raises(UserError, match=r"'a' is duplicated \(records 1 and 2\)"):
        read_questions(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="no questions"):
        read_questions(path)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_questions(path)


def test_a_pair_of_equal_responses_is_refused():
    turn = '[{"role": "assistant", "content": "x"}]'
    line = f'{{"id": "p", "prompt": [{{"role": "user", "content": "q"}}], "chosen": {turn}, "rejected": {turn}}}'
    with pytest.raises(UserError, match="chosen equals rejected"):
        parse_line(line, Pair, "pairs.jsonl:1")


def test_records_come_back_as_they_were_written(tmp_path):
    question = Question(
        id="q", question="Was ist das? 是什么", images=["a.png"], answer="ein Bär", meta={"task": [1, 2]}
    )
    samples = Samples(id="q", question=question, responses=[{"text": "x\ny", "num_tokens": 2}], seed=7)
    write_jsonl(tmp_path / "samples.jsonl", [samples])
    assert read_jsonl(tmp_path / "samples.jsonl", Samples) == [samples]
    assert list(tmp_path.iterdir()) == [tmp_path / "samples.jsonl"]


def test_half_a_character_is_written_and_read_again(tmp_path):
    """A server's JSON may hold it; UTF-8 has no bytes for it."""
    evidence = {"rationale": "caf\u00e9 \ud83d", "\udc80": ["\U0001f600", "\udfff\n", "\\ud83d"]}
    scores = [Judgement(id=f"q{number}", rewards=[1.0], evidence=evidence) for number in range(2)]
    write_jsonl(tmp_path / "scores.jsonl", scores)
    assert read_jsonl(tmp_path / "scores.jsonl", Judgement) == scores
    assert "caf\u00e9" in (tmp_path / "scores.jsonl").read_text(encoding="utf-8")
    part = PartialFile(tmp_path / "more.jsonl", Judgement)
    for line in scores:
        part.append(line)
    assert part.finish(["q1", "q0"]) == scores[::-1]
    assert read_jsonl(tmp_path / "more.jsonl", Judgement) == scores[::-1]


def test_a_response_with_half_a_character_is_one_that_can_be_trained_on():
    response = Response(text="a \ud83d cat \U0001f600", num_tokens=3)
    assert response.text == "a \ufffd cat \U0001f600"
    assert json.loads(to_line(response))["text"] == response.text


def test_a_pair_with_half_a_character_is_refused():
    line = {
        "id": "p",
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "?"}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "\ud83d"}]}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    with pytest.raises(UserError, match=r"pairs.jsonl:1: .*half of a character \(\\ud83d\)"):
        parse_line(json.dumps(line), Pair, "pairs.jsonl:1")


def test_an_unknown_kind_of_answer_is_told_when_the_question_is_read(tmp_path):
    line = '{"id": "q", "question": "How many?", "answer": "3", "answer_kind": "numeric"}\n'
    (tmp_path / "q.jsonl").write_text('{"id": "p", "question": "?", "answer_kind": "number"}\n' + line)
    with pytest.raises(UserError, match=r"q.jsonl:2: .*answer_kind: must be one of exact, .*, found 'numeric'"):
        read_questions(tmp_path / "q.jsonl")


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "q.jsonl").write_bytes('{"id": "q", "question": "Où?"}\n'.encode("utf-8-sig"))
    assert [question.question for question in read_questions(tmp_path / "q.jsonl")] == ["Où?"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("[" * 50_000 + "]" * 50_000, "nested too deep"),
        ("[" * 900 + "]" * 900, "nested too deep"),
        ("9" * 5_000, "digits"),
    ],
)
def test_what_json_cannot_read_is_one_message(value, says, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"id": "q", "question": "What?", "meta": {"a": ' + value + "}}")
    with pytest.raises(UserError, match=rf"q\.jsonl:1: .*{says}"):
        read_questions(tmp_path / "q.jsonl")


def test_the_old_name_of_absent_objects_is_told_the_new_one():
    with pytest.raises(UserError, match=r"unknown key 'absent' \(did you mean 'absent_objects'"):
        parse_line('{"id": "q", "question": "What?", "absent": ["dog"]}', Question, "q.jsonl:1")


def test_a_file_that_is_another_one_is_told_at_once_and_not_line_by_line(tmp_path):
    path = tmp_path / "samples.jsonl"
    good = '{"id": "q", "question": "What?"}\n'
    path.write_text('{\n"stages": {},\n"checksum": "x"\n}\n' + good)
    with pytest.raises(UserError, match=r"samples\.jsonl:1: .*4 of 5 lines cannot be read.*put it back from a copy"):
        list(iter_jsonl(path, Question))
    path.write_text("{\n" + good * 5 + "{\n" * 4)
    with pytest.raises(UserError, match="correct that line, or take it out of the file"):
        list(iter_jsonl(path, Question))
