"""Filters of a conversion: what is left out, counted and drawn, whatever the format."""

import json
import time

import numpy as np
import pytest
from PIL import Image

from align.data.duplicates import Duplicates
from align.data.pictures import Picture, PictureStore
from align.errors import UserError
from align.media.images import ImageStore
from align.records import Pair, Question, read_jsonl
from tests.data.sources import imported, lines, picture, png, save_pictures, write_jsonl


def ask(image, question="What is it?", **more):
    return {"question": question, "image": image} | more


def test_unreadable_truncated_and_small_images_are_left_out_by_reason(tmp_path):
    save_pictures(tmp_path, 3)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "torn.png").write_bytes(png(5, width=400, height=300)[:-200])
    picture(6, 400, 300).save(tmp_path / "whole.jpg", quality=95)
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-3000])
    picture(7, 64, 20).save(tmp_path / "flat.png")
    names = ["1.png", "text.png", "torn.png", "torn.jpg", "flat.png", "gone.png"]
    done = imported(write_jsonl(tmp_path / "a.jsonl", [ask(name) for name in names]), tmp_path / "out", "plain")
    assert [line["images"] for line in lines(done.path)] == [["1.png"]]
    assert done.counts.dropped == {"image cannot be read": 4, "image too small": 1}
    assert done.counts.rows == done.counts.written + done.counts.dropped.total()


def test_pictures_that_are_shown_otherwise_than_they_are_stored_are_counted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1).save(tmp_path / "turned.jpg", exif=exif)
    see_through = picture(3).convert("RGBA")
    see_through.putalpha(100)
    see_through.save(tmp_path / "clear.png")
    picture(4).save(tmp_path / "plain.png")
    rows = [ask(name) for name in ("turned.jpg", "clear.png", "plain.png")]
    done = imported(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out", "plain")
    assert done.counts.treated == {"turned upright (EXIF orientation)": 1, "laid on white (transparency)": 1}
    assert "images, whenever they are opened: turned upright (EXIF orientation) (1)" in done.counts.text()


def test_the_same_question_about_nearly_the_same_image_counts_once(tmp_path):
    save_pictures(tmp_path, 3)
    picture(1).resize((128, 96), Image.Resampling.BICUBIC).save(tmp_path / "scaled.png")
    picture(1).save(tmp_path / "recompressed.jpg", quality=60)
    rows = [
        ask("1.png"),
        ask("scaled.png"),
        ask("recompressed.jpg"),
        ask("2.png"),
        ask("scaled.png", "Another question?"),
        ask("1.png", "<image>\nWHAT is it?"),
    ]
    done = imported(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out", "plain")
    assert [line["images"][0] for line in lines(done.path)] == ["1.png", "2.png", "scaled.png"]
    assert done.counts.dropped == {"duplicate": 3}


def test_pairs_with_other_answers_are_no_duplicates(tmp_path):
    save_pictures(tmp_path, 2)
    rows = [ask("1.png", chosen="a", rejected=text) for text in ("b", "c", "b")]
    done = imported(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out", "plain")
    assert done.counts.written == 2


def test_images_near_to_evaluation_images_are_left_out(tmp_path):
    save_pictures(tmp_path / "train", 4)
    (tmp_path / "eval").mkdir()
    picture(2).resize((96, 72), Image.Resampling.BICUBIC).save(tmp_path / "eval/held.jpg", quality=80)
    write_jsonl(tmp_path / "eval/questions.jsonl", [{"id": "e1", "question": "Else?", "images": ["held.jpg"]}])
    source = write_jsonl(tmp_path / "train/a.jsonl", [ask(f"{number}.png") for number in range(4)])
    done = imported(source, tmp_path / "out", "plain", against=tmp_path / "eval/questions.jsonl")
    assert [line["images"][0] for line in lines(done.path)] == ["0.png", "1.png", "3.png"]
    assert done.counts.dropped == {"near to an evaluation image": 1}


def test_a_limit_draws_the_same_rows_every_time_and_others_by_another_seed(tmp_path):
    save_pictures(tmp_path, 1)
    source = write_jsonl(tmp_path / "a.jsonl", [ask("0.png", f"Question {n}?") for n in range(50)])
    drawn = {
        (seed, run): [line["question"] for line in lines(imported(source, tmp_path / f"{seed}{run}", "plain", limit=10, seed=seed).path)]
        for seed in (0, 1)
        for run in (0, 1)
    }  # fmt: skip
    assert drawn[0, 0] == drawn[0, 1] != drawn[1, 0]
    assert len(drawn[0, 0]) == 10
    assert drawn[0, 0] == sorted(drawn[0, 0], key=lambda text: int(text.split()[1][:-1]))


def test_files_and_bytes_together_need_copies(tmp_path):
    save_pictures(tmp_path / "in", 2)
    import base64

    uri = "data:image/png;base64," + base64.b64encode(png(5)).decode()
    source = write_jsonl(tmp_path / "in/a.jsonl", [ask("1.png"), ask(uri)])
    with pytest.raises(UserError, match=r"1 images are files in .* and 1 came as bytes.*--copy-images"):
        imported(source, tmp_path / "out", "plain")
    done = imported(source, tmp_path / "copied", "plain", copy_images=True)
    assert done.image_root == tmp_path / "copied"
    store = ImageStore(done.image_root)
    assert [store.open(line["images"][0]).tobytes() for line in lines(done.path)] == [
        picture(1).tobytes(),
        picture(5).tobytes(),
    ]


def test_an_image_outside_the_root_is_left_out(tmp_path):
    save_pictures(tmp_path, 2)
    (tmp_path / "in").mkdir()
    source = write_jsonl(tmp_path / "in/a.jsonl", [ask("../1.png"), ask(None)])
    done = imported(source, tmp_path / "out", "plain")
    assert done.counts.dropped == {"image outside the image root": 1}


def test_what_is_written_are_records_and_the_counts_stand_beside_them(tmp_path):
    save_pictures(tmp_path, 2)
    rows = [ask("1.png", chosen="a", rejected="b"), "{torn"]
    done = imported(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out", "plain")
    assert len(read_jsonl(done.path, Pair)) == 1
    counts = json.loads((tmp_path / "out/import.json").read_text())
    assert (counts["rows"], counts["written"], counts["dropped"]) == (2, 1, {"no valid JSON": 1})
    questions = imported(tmp_path / "a.jsonl", tmp_path / "q", "plain", make="questions")
    assert read_jsonl(questions.path, Question)[0].images == ["1.png"]


def test_a_text_that_is_no_path_is_an_image_that_cannot_be_read(tmp_path):
    # Base64 without the head of a data URI, and half a character, are reported in short; the counts can be written.
    save_pictures(tmp_path, 1)
    rows = [ask("0.png"), ask("iVBORw0KGgo" * 2000), ask("\ud83d.png"), ask("a\0b.png")]
    done = imported(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out", "plain")
    assert (done.counts.written, done.counts.dropped) == (1, {"image cannot be read": 3})
    counts = json.loads((tmp_path / "out/import.json").read_text())
    assert counts["faults"][1].endswith(r"/\ud83d.png")
    assert all(len(fault) < 600 for fault in counts["faults"])


def test_text_that_is_not_utf8_is_never_read_as_something_else(tmp_path):
    line = json.dumps(ask([], "Où est-il?"), ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(line.encode("utf-8-sig") + b"\n" + line.replace("est", "va").encode("latin-1"))
    done = imported(tmp_path / "a.jsonl", tmp_path / "out", "plain")
    assert [made["question"] for made in lines(done.path)] == ["Où est-il?"]
    assert done.counts.dropped == {"not UTF-8 text": 1}
    for name, text in (("b.json", f"[{line}]"), ("c.csv", "question\nOù est-il?\n")):
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=rf"{name}: not UTF-8 text \(byte \d+\); save it as UTF-8"):
            imported(tmp_path / name, tmp_path / "other", "plain")
        (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
        assert imported(tmp_path / name, tmp_path / name[0], "plain").counts.written == 1


def test_every_id_is_another_whatever_the_ids_of_the_source(tmp_path):
    names = ["x", "x", "x#2", "y#2", "y", "y", "x#2#2"]
    rows = [{"id": name, "question": f"Question {n}?"} for n, name in enumerate(names)]
    done = imported(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out", "plain")
    found = [line["id"] for line in lines(done.path)]
    assert found == ["x", "x#2", "x#2#2", "y#2", "y", "y#3", "x#2#2#2"]


def test_one_question_about_many_pictures_takes_no_time_a_picture():
    draw = np.random.default_rng(0)
    prints = [(draw.integers(0, 256, 16, dtype=np.uint8), np.zeros(192, dtype=np.uint8)) for _ in range(4000)]
    for bits, _ in prints:
        bits[:8] = 0  # as where the sky is above in all of them
    duplicates, times = Duplicates(), [time.process_time()]
    for n, one in enumerate(prints):
        assert not duplicates.seen(["What?"], (Picture(f"{n}", (64, 48), one),))
        times += [time.process_time()] if n % 1000 == 999 else []
    assert duplicates.seen(["WHAT?"], (Picture("again", (64, 48), prints[1234]),))
    assert not duplicates.seen(["What?"], (Picture("a", (64, 48), prints[0]), Picture("b", (64, 48), prints[1])))
    # Were each compared with all before it, the last thousand would take seven times as long as the first.
    assert times[4] - times[3] < 3.5 * (times[1] - times[0])


def test_an_image_is_opened_once_however_often_it_is_asked_for(tmp_path):
    save_pictures(tmp_path, 1)
    store = PictureStore(tmp_path, tmp_path / "out", min_side=1)
    first = store.take("0.png")
    (tmp_path / "0.png").unlink()
    assert store.take("0.png") is first
