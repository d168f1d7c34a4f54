"""Files as they come: arrays and lines, byte order marks, what is broken in one row, and paths that lead away."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data import json_rows as module
from align.data.entry import BadRow
from align.data.fields import Fields
from align.data.json_rows import json_rows
from align.errors import UserError
from tests.data.sources import imported, lines, png, save_pictures, write_json, write_jsonl

DEEP, LONG = "[" * 50_000 + "]" * 50_000, "9" * 5_000


def rows_of(path, text, chunk=None, monkeypatch=None):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if chunk is not None:
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    return [row.data if isinstance(row.data, dict) else row.data.reason for row in json_rows(path)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_an_array_is_read_row_by_row_wherever_the_chunks_end(chunk, tmp_path, monkeypatch):
    rows = [{"a": 'x\\"]}[{ü', "b": [1.5, None, {"c": "😀"}]}, {}, {"d": -12e3}]
    for text in (json.dumps(rows), json.dumps(rows, indent=3, ensure_ascii=False)):
        assert rows_of(tmp_path / "a.json", text, chunk, monkeypatch) == rows
        assert rows_of(tmp_path / "a.json", text.encode("utf-8-sig"), chunk, monkeypatch) == rows


JSON = st.recursive(st.none() | st.booleans() | st.integers(-9, 9**20) | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8)  # fmt: skip


@given(st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=4), st.integers(1, 9), st.booleans())
@settings(max_examples=60)
def test_any_array_reads_as_json_reads_it(tmp_path_factory, rows, chunk, ascii_only):
    path = tmp_path_factory.mktemp("arrays") / "a.json"
    text = json.dumps(rows, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    path.write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", chunk)
        try:
            expected = json.loads(text.decode())
        except UnicodeDecodeError:
            with pytest.raises(UserError, match="not UTF-8 text"):
                list(json_rows(path))
        else:
            assert [row.data for row in json_rows(path)] == expected


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (f'{{"a": {DEEP}}}', "nested too deep"),
        (f'{{"a": {LONG}}}', "a number has too many digits"),
        ('{"a": nope}', "no valid JSON"),
        ("7", "no JSON object"),
        ("nope", "no valid JSON"),
        ('"a"', "no JSON object"),
        ("[1]", "no JSON object"),
    ],
)
def test_one_bad_row_is_one_counted_row(bad, reason, tmp_path):
    good = '{"question": "What?"}'
    assert rows_of(tmp_path / "a.json", f"[{good}, {bad}, {good}]") == [
        {"question": "What?"},
        reason,
        {"question": "What?"},
    ]
    found = rows_of(tmp_path / "a.jsonl", f"{good}\n{bad}\n{good}\n")
    assert found == [{"question": "What?"}, reason, {"question": "What?"}]


def test_what_a_file_holds_decides_how_it_is_read_not_its_name(tmp_path):
    assert rows_of(tmp_path / "a.jsonl", '\n [{"a": 1},\n {"a": 2}]') == [{"a": 1}, {"a": 2}]
    assert rows_of(tmp_path / "a.json", '{"a": 1}\n{"a": 2}\n') == [{"a": 1}, {"a": 2}]
    assert rows_of(tmp_path / "a.json", '{\n "a": 1}\n') == [{"a": 1}]
    assert rows_of(tmp_path / "a.json", "[]") == []


@pytest.mark.parametrize(
    "text", ['[{"a": 1}', '[{"a": 1}, {"a"', '[{"a": 1} {"a": 2}]', "[", '[{"a": 1},', '[{"a": "x']
)
def test_an_array_that_is_cut_is_no_array(text, tmp_path):
    with pytest.raises(UserError, match=r"a\.json: not valid JSON .*is the file complete\?"):
        rows_of(tmp_path / "a.json", text)


def test_deep_values_that_json_reads_are_left_out_where_they_cannot_be_kept(tmp_path):
    nested: dict = {}
    for _ in range(300):
        nested = {"a": nested}
    rows = [{"question": "What?", "meta": nested}, {"question": "What?", "meta": {"a": float("nan")}}]
    done = imported(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out")
    assert lines(done.path)[0]["meta"] == {"a": None}
    assert done.counts.dropped == {"nested too deep": 1}


def test_a_listing_may_begin_with_a_byte_order_mark(tmp_path):
    save_pictures(tmp_path / "images", 1)
    write_jsonl(tmp_path / "a.jsonl", [{"image": "0.png", "question": "What?", "chosen": "a", "rejected": "b"}])
    meta = json.dumps({"a": {"root": "images", "annotation": "a.jsonl"}})
    (tmp_path / "meta.json").write_bytes(meta.encode("utf-8-sig"))
    assert imported(tmp_path / "meta.json", tmp_path / "out").counts.written == 1


@pytest.mark.parametrize(("repeat", "numbers"), [(0.5, [0, 1]), (2, [0, 0, 1, 1, 2, 2, 3, 3]), (1.25, [0, 0, 1, 2, 3])])
def test_rows_count_as_often_as_the_listing_repeats_them(repeat, numbers, tmp_path):
    save_pictures(tmp_path, 1)
    rows = [{"image": "0.png", "question": f"Is it {n}?", "chosen": "a", "rejected": "b"} for n in range(4)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    source = write_json(tmp_path / "meta.json", {"a": {"root": ".", "annotation": "a.jsonl", "repeat_time": repeat}})
    done = imported(source, tmp_path / "out")
    made = lines(done.path)
    assert [line["prompt"][0]["content"][1]["text"] for line in made] == [f"Is it {n}?" for n in numbers]
    assert len({line["id"] for line in made}) == len(made) == done.counts.rows
    drawn = imported(source, tmp_path / "drawn", limit=len(numbers) - 1)
    assert drawn.counts.rows == drawn.counts.written == len(numbers) - 1


@pytest.mark.parametrize("repeat", [-1, "twice", True, 10**9, None])
def test_a_repetition_that_is_none_is_refused(repeat, tmp_path):
    save_pictures(tmp_path, 1)
    write_jsonl(tmp_path / "a.jsonl", [{"question": "What?"}])
    source = write_json(tmp_path / "meta.json", {"a": {"root": ".", "annotation": "a.jsonl", "repeat_time": repeat}})
    with pytest.raises(UserError, match="repeat_time of 'a' is a number from 0 to 1000"):
        imported(source, tmp_path / "out")


def test_images_outside_the_root_are_not_even_copied(tmp_path):
    save_pictures(tmp_path, 2)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/inner.png").write_bytes(png(2))
    (tmp_path / "in/link.png").symlink_to(tmp_path / "0.png")
    (tmp_path / "in/loop.png").symlink_to("loop.png")
    names = ["../0.png", str(tmp_path / "1.png"), "link.png", "file:///etc/passwd", "loop.png", "a\0b.png", "inner.png"]
    rows = [{"question": f"{n}?", "image": name} for n, name in enumerate(names)]
    source = write_jsonl(tmp_path / "in/a.jsonl", rows)
    for copy in (False, True):
        done = imported(source, tmp_path / f"out{copy}", copy_images=copy)
        assert done.counts.dropped == {"image outside the image root": 4, "image cannot be read": 2}
        assert [line["question"] for line in lines(done.path)] == ["6?"]
    assert len(os.listdir(tmp_path / "outTrue/images")) == 1


def test_videos_are_looked_for_inside_the_root_and_copied_with_the_rest(tmp_path):
    save_pictures(tmp_path / "in/frames", 2)
    save_pictures(tmp_path / "away", 2)
    names = ["frames", "../away", "gone.mp4", ["frames", "frames"]]
    rows = [{"question": "What happens?", "video": name, "n": 1} for name in names]
    done = imported(write_jsonl(tmp_path / "in/a.jsonl", rows), tmp_path / "out", copy_images=True)
    [question] = lines(done.path)
    assert sorted(os.listdir(tmp_path / "out" / question["video"])) == ["0.png", "1.png"]
    assert done.counts.dropped == {
        "image outside the image root": 1,
        "image cannot be read": 1,
        "about several videos": 1,
    }
    assert done.counts.without_image == 0


def test_the_same_question_about_two_videos_is_two_questions(tmp_path):
    save_pictures(tmp_path / "a", 1)
    save_pictures(tmp_path / "b", 1)
    rows = [{"question": "What happens?", "video": name} for name in ("a", "b", "a")]
    done = imported(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out")
    assert [line["video"] for line in lines(done.path)] == ["a", "b"]


def test_tables_with_missing_values_have_no_answer_nan(tmp_path):
    rows = [{"question": "How many?", "answer": value} for value in (float("nan"), None, 3.0, 3.5, ["3"])]
    rows = [row | {"question": f"{n}?"} for n, row in enumerate(rows)]
    done = imported(
        write_jsonl(tmp_path / "a.jsonl", [*rows, {"question": "5?", "answer": ["a", "b"]}]), tmp_path / "o"
    )
    assert [line.get("answer") for line in lines(done.path)] == [None, None, "3", "3.5", "3"]
    assert done.counts.dropped == {"answer is no text": 1}


@pytest.mark.parametrize("column", ["image_url", "image_src", "img", "IMAGE", "the picture", "image_1"])
def test_an_image_is_found_whatever_its_column_is_called(column, tmp_path):
    save_pictures(tmp_path, 2)
    rows = [{"question": "What is on the left?", column: f"{n}.png"} for n in range(2)]
    done = imported(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out")
    assert [line["images"] for line in lines(done.path)] == [["0.png"], ["1.png"]]
    assert done.counts.columns[column] == {"images": 2}


def test_numbered_image_columns_are_taken_in_their_order(tmp_path):
    save_pictures(tmp_path, 2)
    row = {"question": "<image> or <image>?", "image_10": "0.png", "image_2": "1.png", "image_3": None}
    done = imported(write_jsonl(tmp_path / "a.jsonl", [row]), tmp_path / "out")
    assert lines(done.path)[0]["images"] == ["1.png", "0.png"]


def test_a_file_without_any_image_says_so(tmp_path):
    rows = [{"question": f"{n}?", "photo": "gone"} for n in range(2)]
    text = imported(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out").counts.text()
    assert "WARNING: none of the questions has an image; name their column with --columns images=..." in text
    assert "not used: photo (2)" in text
    save_pictures(tmp_path, 1)
    rows.append({"question": "And?", "image": "0.png"})
    text = imported(write_jsonl(tmp_path / "b.jsonl", rows), tmp_path / "out").counts.text()
    assert "2 of 3 questions have no image" in text


def test_base64_without_a_head_is_an_image(tmp_path):
    import base64

    row = {"index": 7, "question": "What?", "image": base64.b64encode(png(1)).decode()}
    (tmp_path / "bench.tsv").write_text("\t".join(row) + "\n" + "\t".join(map(str, row.values())) + "\n")
    done = imported(tmp_path / "bench.tsv", tmp_path / "out")
    [question] = lines(done.path)
    assert (question["id"], (tmp_path / "out" / question["images"][0]).read_bytes()) == ("7", png(1))


def test_reasons_are_counted_once(tmp_path):
    with pytest.raises(UserError) as caught:
        imported(write_jsonl(tmp_path / "a.jsonl", ["{torn", {"question": " "}]), tmp_path / "out", "plain")
    assert str(caught.value).count("(1)") == 2


def test_a_column_that_nobody_took_is_unused():
    row = Fields({"Question": "What?", "a": None, "b": float("nan"), "c": [], "d": 0})
    assert (row.text("question"), row.unused, row.became) == ("What?", ["d"], {"Question": "question"})
    with pytest.raises(BadRow, match="no answer: the row has Question"):
        row.text("answer")
