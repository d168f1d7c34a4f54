"""Every reader on a small file in the real format: what it makes of good rows, and what it says of bad ones."""

import base64
import json
from pathlib import Path

import pytest

from align.data.formats import FORMATS
from align.errors import UserError
from tests.data.sources import (
    asked,
    imported,
    lines,
    png,
    reply,
    save_pictures,
    write_json,
    write_jsonl,
    write_parquet,
)


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def test_llava_takes_the_last_question_of_a_dialogue_with_the_earlier_turns_as_history(tmp_path):
    save_pictures(tmp_path / "coco", 4, "train2017/{:012d}.png")
    rows = [
        {
            "id": "000000000001",
            "image": "train2017/000000000001.png",
            "conversations": [human("<image>\nWhat is it?"), gpt("A shape."), human("Which colour?"), gpt("Red.")],
        },
        {"id": "2", "image": "train2017/000000000002.png", "conversations": [human("Describe.\n<image>"), gpt("Two.")]},
        {"id": "text", "conversations": [human("What is a cat?"), gpt("An animal.")]},
        {"id": "bad", "image": "train2017/000000000003.png", "conversations": [{"from": "nobody", "value": "?"}]},
        {"id": "bad", "image": "train2017/000000000003.png", "conversations": []},
        {"id": "bad", "image": "train2017/000000000003.png", "conversations": [{"from": ["human"], "value": "?"}]},
        {"id": "bad", "image": "train2017/none.png", "conversations": [human("<image>?"), gpt("!")]},
        "no object",
        {"id": "tags", "conversations": [human("<image>\nWhat is it?"), gpt("?")]},
    ]
    done = imported(write_json(tmp_path / "llava.json", rows), tmp_path / "out", "llava", image_root=tmp_path / "coco")
    made = lines(done.path)
    assert [line["id"] for line in made] == ["000000000001", "2", "text"]
    assert made[0]["question"] == "Which colour?"
    assert [turn["content"] for turn in made[0]["history"]] == ["<image>\nWhat is it?", "A shape."]
    assert made[0]["images"] == ["train2017/000000000001.png"]
    assert "answer" not in made[0]
    assert done.counts.dropped == {
        "a turn of conversations has no speaker or no text": 2,
        "conversations is no list of turns": 1,
        "image cannot be read": 1,
        "no JSON object": 1,
        "image tags and images differ": 1,
    }
    assert done.counts.unused == {"conversations (the last answer)": 3}
    assert f"{tmp_path / 'llava.json'}, entry 4: a turn of conversations has no speaker" in done.counts.faults[0]


def test_llava_preferences_become_pairs_as_the_human_chose(tmp_path):
    save_pictures(tmp_path, 3)

    def row(preference, **changes):
        base = {"id": "x", "image": "1.png", "conversations": [human("Hi <image>"), gpt("Hello."), human("What?")]}
        return base | {"output_1": gpt("one"), "output_2": gpt("two"), "preference": preference} | changes

    rows = [row(1), row(2, image="2.png"), row(3), row(1, output_2={"from": "gpt"})]
    done = imported(write_json(tmp_path / "p.json", rows), tmp_path / "out", "llava-preference")
    made = lines(done.path)
    assert [(reply(line, "chosen"), reply(line, "rejected")) for line in made] == [("one", "two"), ("two", "one")]
    assert asked(made[0]) == [("user", ["Hi ", "<image>"]), ("assistant", ["Hello."]), ("user", ["What?"])]
    assert [line["id"] for line in made] == ["x", "x#2"]
    assert done.counts.dropped == {"preference is neither 1 nor 2": 1, "output_1 or output_2 has no text": 1}


def test_mmpr_reads_every_source_that_its_meta_file_names(tmp_path):
    save_pictures(tmp_path / "MMPR/images/ScienceQA", 3)
    save_pictures(tmp_path / "MMPR/images/Multi", 2, "a/{}.jpg")
    write_jsonl(
        tmp_path / "MMPR/annotations/science.jsonl",
        [
            {"image": "1.png", "question": "<image>\nWhich?", "chosen": "Answer: A", "rejected": "Answer: B"},
            {"image": "2.png", "question": "Which?", "chosen": "", "rejected": "B"},
            '{"image": "2.png", "question":',
            {"image": "2.png", "question": "Which?", "chosen": "same", "rejected": "same"},
        ],
    )
    write_jsonl(
        tmp_path / "MMPR/annotations/multi.jsonl",
        [
            {
                "image": ["a/0.jpg", "a/1.jpg"],
                "question": "<image> and <image>?",
                "chosen": "x",
                "rejected": "y",
                "answer_gt": "x",
            },
            {"question": "No picture: 1 + 1?", "chosen": "2", "rejected": "3"},
        ],
    )
    meta = {
        "science_rules": {"root": "MMPR/images/ScienceQA", "annotation": "MMPR/annotations/science.jsonl", "data_augment": False, "repeat_time": 1, "length": 4},
        "multi": {"root": "images/Multi", "annotation": "annotations/multi.jsonl", "repeat_time": 1, "length": 2},
    }  # fmt: skip
    source = write_json(tmp_path / "MMPR/meta.json", meta)
    done = imported(source, tmp_path / "out", "mmpr")
    made = lines(done.path)
    assert [line.get("images", []) for line in made] == [
        ["images/ScienceQA/1.png"],
        ["images/Multi/a/0.jpg", "images/Multi/a/1.jpg"],
        [],
    ]
    assert done.image_root == tmp_path / "MMPR"
    assert asked(made[1]) == [("user", ["<image>", " and ", "<image>", "?"])]
    assert (reply(made[0], "chosen"), made[0]["meta"]) == ("Answer: A", {"source": "science_rules"})
    assert done.counts.dropped == {"chosen is empty": 1, "no valid JSON": 1, "chosen equals rejected": 1}
    assert any(f"{tmp_path}/MMPR/annotations/science.jsonl:3: no valid JSON" in fault for fault in done.counts.faults)
    questions = imported(source, tmp_path / "q", "mmpr", make="questions")
    assert [line.get("answer") for line in lines(questions.path)][-2:] == ["x", None]


def test_a_meta_file_that_names_what_is_not_there_is_refused(tmp_path):
    source = write_json(tmp_path / "meta.json", {"a": {"root": "images", "annotation": "a.jsonl"}})
    with pytest.raises(UserError, match=r"meta.json names 'a.jsonl', which is not there"):
        imported(source, tmp_path / "out", "mmpr")


def test_rlaif_v_takes_images_out_of_its_parquet_rows(tmp_path):
    def row(index, **changes):
        base = {
            "ds_name": "RLAIF-V",
            "image": {"bytes": png(index), "path": f"{index}.jpg"},
            "question": f"What is in picture {index}?",
            "chosen": "A disc.",
            "rejected": "A dog.",
            "origin_dataset": "made here",
            "origin_split": "{}",
            "idx": str(index),
            "image_path": f"images/{index}.jpg",
        }
        return base | changes

    rows = [row(0), row(1), row(2, image={"bytes": b"no picture", "path": None}), row(3, rejected=None)]
    source = write_parquet(tmp_path / "train.parquet", rows)
    done = imported(source, tmp_path / "out", "rlaif-v")
    made = lines(done.path)
    assert [line["id"] for line in made] == ["RLAIF-V-0", "RLAIF-V-1"]
    assert [(done.image_root / line["images"][0]).read_bytes() for line in made] == [png(0), png(1)]
    assert done.image_root == tmp_path / "out"
    assert asked(made[0]) == [("user", ["<image>", "What is in picture 0?"])]
    assert done.counts.dropped == {"image cannot be read": 1, "no rejected": 1}
    assert f"{source}, row 4: no rejected" in done.counts.faults[1]


def test_rlhf_v_has_its_texts_as_json(tmp_path):
    save_pictures(tmp_path, 2)
    text = json.dumps({"question": "What?", "chosen": "good", "rejected": "bad"})
    rows = [
        {"ds_name": "RLHF-V", "image_path": "1.png", "text": text, "idx": 7},
        {"ds_name": "RLHF-V", "image_path": "1.png", "text": "{broken", "idx": 8},
        {"ds_name": "RLHF-V", "text": text, "idx": 9},
    ]
    done = imported(write_jsonl(tmp_path / "r.jsonl", rows), tmp_path / "out", "rlhf-v")
    made = lines(done.path)
    assert [(line["id"], reply(line, "chosen"), reply(line, "rejected")) for line in made] == [
        ("RLHF-V-7", "good", "bad")
    ]
    assert done.counts.dropped == {"text is no valid JSON": 1, "no image": 1}


def rated(model, response, *ratings):
    aspects = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
    annotations = {a: {"Rating": r, "Rationale": "why"} for a, r in zip(aspects, ratings, strict=True)}
    return {"model": model, "response": response, "annotations": annotations}


def test_vlfeedback_pairs_the_best_with_the_worst_rated_answer(tmp_path):
    save_pictures(tmp_path, 3)
    four = [rated("a", "fair", "4", "5", "3"), rated("b", "best", "5", "5", "5"), rated("c", "worst", "2", "5", "N/A"), rated("d", "unrated", "N/A", "N/A", "N/A")]  # fmt: skip
    columns = {key: [completion[key] for completion in four] for key in four[0]}
    ties = [rated("a", "x", "3", "3", "3"), rated("b", "y", "3", "3", "3")]
    rows = [
        {"id": "1", "prompt": "What?", "img_path": "1.png", "models": ["a", "b"], "completions": four},
        {"id": "2", "prompt": "What?", "img_path": "2.png", "models": ["a", "b"], "completions": columns},
        {"id": "3", "prompt": "What?", "img_path": "2.png", "completions": ties},
        {"id": "4", "prompt": "What?", "img_path": "2.png", "completions": "none"},
        {"id": "5", "prompt": " ", "img_path": "2.png", "completions": four},
    ]
    done = imported(write_jsonl(tmp_path / "v.jsonl", rows), tmp_path / "out", "vlfeedback")
    made = lines(done.path)
    assert [(reply(line, "chosen"), reply(line, "rejected")) for line in made] == [("best", "worst")] * 2
    assert made[0]["margin"] == pytest.approx(5 - 3.5)
    assert done.counts.dropped == {
        "no two answers differ in their ratings": 1,
        "completions are no list": 1,
        "prompt is empty": 1,
    }


def test_mm_rlhf_takes_images_and_counts_videos(tmp_path):
    save_pictures(tmp_path / "short", 2)
    rows = [
        {"image": "short/1.png", "prompt": "What?", "chosen": "good", "rejected": "bad"},
        {"video": "video/1.mp4", "prompt": "What?", "chosen": "good", "rejected": "bad"},
        {"image": "short/1.png", "prompt": "What?", "chosen": ["good"], "rejected": "bad"},
    ]
    done = imported(write_jsonl(tmp_path / "dpo_pairs.jsonl", rows), tmp_path / "out", "mm-rlhf")
    assert [reply(line, "chosen") for line in lines(done.path)] == ["good"]
    assert done.counts.dropped == {"about a video": 1, "chosen is no text": 1}


def test_spa_vl_has_pairs_for_training_and_bare_questions_for_tests(tmp_path):
    classes = {"class1": "Toxicity", "class2": "Insult", "class3": ""}
    rows = [
        {"image": {"bytes": png(1), "path": None}, "question": "Safe?", "chosen": "No.", "rejected": "Yes."} | classes,
        {"image": {"bytes": png(2), "path": None}, "question": "Safe?", "chosen": None, "rejected": None} | classes,
        {"image": None, "question": "Safe?", "chosen": "No.", "rejected": "Yes."} | classes,
    ]
    source = write_parquet(tmp_path / "train-00000-of-00001.parquet", rows)
    done = imported(source, tmp_path / "out", "spa-vl")
    assert [line["meta"] for line in lines(done.path)] == [{"class1": "Toxicity", "class2": "Insult"}]
    assert done.counts.dropped == {"no chosen and rejected answer": 1, "no image": 1}
    assert imported(source, tmp_path / "q", "spa-vl", make="questions").counts.written == 2


def test_povid_pairs_the_two_conversations(tmp_path):
    save_pictures(tmp_path, 3)
    rows = [
        {"id": "1", "image": "1.png", "conversations": [human("<image>\nWhat?"), gpt("A disc.")], "rejected_conversations": [human("<image>\nWhat?"), gpt("A dog.")]},
        {"id": "2", "image": "2.png", "conversations": [human("<image>\nWhat?"), gpt("A disc.")], "rejected_conversations": [human("<image>\nWho?"), gpt("A dog.")]},
        {"id": "3", "image": "2.png", "conversations": [human("<image>\nWhat?")], "rejected_conversations": [human("<image>\nWhat?"), gpt("A dog.")]},
        {"id": "4", "image": "2.png", "conversations": [human("<image>\nWhat?"), gpt("A disc.")]},
    ]  # fmt: skip
    done = imported(write_json(tmp_path / "povid.json", rows), tmp_path / "out", "povid")
    made = lines(done.path)
    assert [(reply(line, "chosen"), reply(line, "rejected")) for line in made] == [("A disc.", "A dog.")]
    assert asked(made[0]) == [("user", ["<image>", "\nWhat?"])]
    assert sum(done.counts.dropped.values()) == 3


def test_plain_tables_bring_images_as_paths_bytes_and_data_uris(tmp_path):
    save_pictures(tmp_path / "pics", 3)
    uri = "data:image/png;base64," + base64.b64encode(png(1)).decode()
    csv = 'prompt,picture,answer\nWhat?,0.png,a disc\nAnd?,"[""1.png"", ""2.png""]",\n,0.png,x\n'
    (tmp_path / "t.csv").write_text(csv)
    names = {"question": "prompt", "images": "picture"}
    done = imported(tmp_path / "t.csv", tmp_path / "csv", "plain", columns=names, image_root=tmp_path / "pics")
    made = lines(done.path)
    assert [(line["question"], line["images"], line.get("answer")) for line in made] == [
        ("What?", ["0.png"], "a disc"),
        ("And?", ["1.png", "2.png"], None),
    ]
    assert f"{tmp_path / 't.csv'}:4: prompt is empty" in done.counts.faults[0]
    rows = [
        {"question": "What?", "image": uri, "chosen": "a", "rejected": "b"},
        {"question": "What?", "image": "data:image/png;base64,%%%", "chosen": "a", "rejected": "b"},
        {"question": "What?", "image": uri, "chosen": "a"},
    ]
    done = imported(write_jsonl(tmp_path / "u.jsonl", rows), tmp_path / "uri", "plain")
    assert [(tmp_path / "uri" / line["images"][0]).read_bytes() for line in lines(done.path)] == [png(1)]
    assert done.counts.dropped == {"image cannot be read": 1, "no rejected": 1}
    table = write_parquet(tmp_path / "b.parquet", [{"id": 5, "question": "What?", "images": [png(1), png(2)]}])
    done = imported(table, tmp_path / "bytes", "plain")
    assert [(line["id"], len(line["images"])) for line in lines(done.path)] == [("5", 2)]


def test_datasets_folders_are_read_by_split(tmp_path):
    from datasets import Dataset, DatasetDict, Features, Image, Value

    features = Features({"image": Image(), "question": Value("string"), "chosen": Value("string"), "rejected": Value("string")})  # fmt: skip
    rows = [{"image": {"bytes": png(1), "path": None}, "question": "Q?", "chosen": "a", "rejected": "b"}]
    data = DatasetDict({"train": Dataset.from_list(rows, features), "test": Dataset.from_list(rows * 2, features)})
    data.save_to_disk(str(tmp_path / "saved"))
    done = imported(tmp_path / "saved", tmp_path / "out", "spa-vl")
    assert [(tmp_path / "out" / line["images"][0]).read_bytes() for line in lines(done.path)] == [png(1)]
    with pytest.raises(UserError, match=r"no split 'validation'.*train, test"):
        imported(tmp_path / "saved", tmp_path / "other", "spa-vl", split="validation")


def test_every_format_is_tried_here():
    source = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    assert [name for name in FORMATS if f'"{name}"' not in source] == []


def test_unknown_formats_and_columns_are_told(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"question": "a?"}])
    with pytest.raises(UserError, match="did you mean rlaif-v"):
        imported(tmp_path / "a.jsonl", tmp_path / "out", "rlaifv")
    with pytest.raises(UserError, match="no column is for 'qestion'"):
        imported(tmp_path / "a.jsonl", tmp_path / "out", "plain", columns={"qestion": "a"})
    with pytest.raises(UserError, match="no column 'text'; the columns are question"):
        imported(tmp_path / "a.jsonl", tmp_path / "out", "plain", columns={"question": "text"})
    with pytest.raises(UserError, match="no such file or folder"):
        imported(tmp_path / "b.jsonl", tmp_path / "out", "plain")
