"""Formats of other trainers, recognised by their shape: the right pair or question of each,
and what is said of the rest."""

import base64
import json

import pytest

from align.data.formats import FORMATS
from align.errors import UserError
from align.records import Pair, Question, read_jsonl
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

KITTEN, PUPPY = "This is a kitten.", "This is a puppy."
WHAT = [("user", ["<image>", "What is this?"])]


def user(text, key="content"):
    return {"role": "user", key: text}


def assistant(text):
    return {"role": "assistant", "content": text}


def part(**keys):
    return keys


def read(tmp_path, rows, name=None, **options):
    """What is made of the rows beside pictures 0.png to 2.png, and the counts."""
    save_pictures(tmp_path, 3)
    found = imported(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out", name, **options)
    return lines(found.path), found.counts


SHAPES = [
    ("llama-factory", {"conversations": [{"from": "human", "value": "<image>What is this?"}], "chosen": {"from": "gpt", "value": KITTEN}, "rejected": {"from": "gpt", "value": PUPPY}, "images": ["0.png"]}),
    ("llama-factory", {"messages": [user("<image>What is this?")], "chosen": assistant(KITTEN), "rejected": assistant(PUPPY), "images": ["0.png"]}),
    ("ms-swift", {"messages": [user("<image>What is this?"), assistant(KITTEN)], "images": ["0.png"], "rejected_response": PUPPY}),
    ("ms-swift", {"messages": [user("<img>0.png</img>What is this?"), assistant(KITTEN)], "rejected_response": PUPPY}),
    ("ms-swift", {"messages": [user("<image>What is this?"), assistant(KITTEN)], "images": [{"bytes": None, "path": "0.png"}], "rejected_messages": [user("<image>What is this?"), assistant(PUPPY)], "rejected_images": [{"bytes": None, "path": "0.png"}]}),
    ("ms-swift", {"messages": [user("What is this?"), assistant(KITTEN)], "images": "0.png", "rejected_messages": [assistant(PUPPY)]}),
    ("alpaca", {"query": "<image>What is this?", "response": KITTEN, "rejected_response": PUPPY, "images": ["0.png"]}),
    ("alpaca", {"instruction": "What is this?", "input": "", "output": [KITTEN, PUPPY], "images": ["0.png"]}),
    ("alpaca", {"instruction": "What is this?", "input": "", "chosen": KITTEN, "rejected": PUPPY, "images": ["0.png"]}),
    ("trl", {"images": ["0.png"], "prompt": [user([part(type="image"), part(type="text", text="What is this?")])], "chosen": [assistant([part(type="text", text=KITTEN)])], "rejected": [assistant([part(type="text", text=PUPPY)])]}),
    ("trl", {"images": ["0.png"], "prompt": [user([part(type="image", text=None), part(type="text", text="What is this?", image=None)])], "chosen": [assistant(KITTEN)], "rejected": [assistant(PUPPY)]}),
    ("trl", {"prompt": [user([part(type="image", image="0.png"), part(type="text", text="What is this?")])], "chosen": assistant(KITTEN), "rejected": assistant(PUPPY)}),
    ("trl", {"image": "0.png", "chosen": [user("What is this?"), assistant(KITTEN)], "rejected": [user("What is this?"), assistant(PUPPY)]}),
    ("trl", {"image": "0.png", "prompt": "What is this?", "chosen": [user("What is this?"), assistant(KITTEN)], "rejected": [user("What is this?"), assistant(PUPPY)]}),
    ("openai", {"input": {"messages": [user([part(type="image_url", image_url={"url": "0.png"}), part(type="text", text="What is this?")])]}, "preferred_output": [assistant(KITTEN)], "non_preferred_output": [assistant(PUPPY)]}),
    ("plain", {"question": "What is this?", "image": {"path": "0.png", "bytes": None}, "chosen": KITTEN, "rejected": PUPPY}),
    ("plain", {"prompt": "What is this?", "Image_URL": "0.png", "chosen": KITTEN, "rejected": PUPPY}),
    ("povid", {"image": "0.png", "conversations": [{"from": "human", "value": "<image>What is this?"}, {"from": "gpt", "value": KITTEN}], "rejected_conversations": [{"from": "human", "value": "<image>What is this?"}, {"from": "gpt", "value": PUPPY}]}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_one_pair_in_every_shape_is_the_same_pair(number, tmp_path):
    name, row = SHAPES[number]
    made, counts = read(tmp_path, [row])
    assert counts.formats == {str(tmp_path / "rows.jsonl"): name}
    assert counts.text().startswith(f"read as {name}\n")
    [pair] = made
    assert (pair["images"], asked(pair), reply(pair, "chosen"), reply(pair, "rejected")) == (
        ["0.png"],
        WHAT,
        KITTEN,
        PUPPY,
    )
    assert (counts.unused, counts.without_image) == ({}, 0)


def test_parquet_with_image_structs_as_datasets_writes_them(tmp_path):
    prompt = [user([part(type="image", text=None), part(type="text", text="What is this?")])]
    rows = [{"images": [{"bytes": png(1), "path": None}], "prompt": prompt, "chosen": [assistant(KITTEN)], "rejected": [assistant(PUPPY)]}]  # fmt: skip
    done = imported(write_parquet(tmp_path / "a.parquet", rows), tmp_path / "out")
    [pair] = lines(done.path)
    assert (tmp_path / "out" / pair["images"][0]).read_bytes() == png(1)
    assert (list(done.counts.formats.values()), asked(pair)) == (["trl"], WHAT)


def test_turns_that_datasets_stored_as_columns_are_read(tmp_path):
    turns = {"from": ["human", "gpt"], "value": ["<image>What is this?", KITTEN]}
    made, counts = read(tmp_path, [{"image": "0.png", "conversations": turns}])
    assert (made[0]["question"], list(counts.formats.values())) == ("<image>What is this?", ["llava"])


def test_alpaca_keeps_input_system_and_history(tmp_path):
    row = {"instruction": "Describe it in the style asked for.", "input": "In one French word.", "chosen": "Chaton", "rejected": "Kitten", "images": ["0.png"], "system": "Be brief.", "history": [["hi", "hello"]]}  # fmt: skip
    [pair], _ = read(tmp_path, [row])
    assert asked(pair) == [
        ("system", ["Be brief."]),
        ("user", ["<image>", "hi"]),
        ("assistant", ["hello"]),
        ("user", ["Describe it in the style asked for.\nIn one French word."]),
    ]


def test_a_dialogue_keeps_its_system_prompt_and_says_that_its_last_answer_is_not_used(tmp_path):
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A kitten."}]  # fmt: skip
    [question], counts = read(tmp_path, [{"image": "0.png", "conversations": turns, "source": "x"}])
    assert question["system"] == "Be brief."
    assert counts.unused == {"source": 1, "conversations (the last answer)": 1}
    assert "not used: source (1), conversations (the last answer) (1)" in counts.text()


def test_openai_images_may_be_data_uris_and_tools_are_said_to_be_unused(tmp_path):
    uri = "data:image/png;base64," + base64.b64encode(png(2)).decode()
    content = [part(type="text", text="Look: "), part(type="image_url", image_url={"url": uri, "detail": "low"})]
    rows = [
        {
            "input": {"messages": [user(content)], "tools": [{"name": "x"}], "parallel_tool_calls": True},
            "preferred_output": [assistant("a")],
            "non_preferred_output": [assistant("b")],
        },
        {"input": {"messages": [user("?")]}, "preferred_output": [assistant("a"), assistant("b")], "non_preferred_output": [assistant("c")]},
    ]  # fmt: skip
    [pair], counts = read(tmp_path, rows)
    assert asked(pair) == [("user", ["Look: ", "<image>"])]
    assert counts.unused == {"input.tools": 1, "input.parallel_tool_calls": 1}
    assert counts.dropped == {"preferred_output does not end with one response": 1}


def test_what_messages_may_not_be_is_counted_by_its_reason(tmp_path):
    good = {"messages": [user("What?"), assistant("a")], "rejected_response": "b"}
    bad = {
        "a turn of a tool": [user("What?"), {"role": "tool", "content": "4"}],
        "an image in a turn of the assistant": [user("What?"), assistant([part(type="image", image="0.png")])],
        "a system turn stands in the middle": [user("What?"), {"role": "system", "content": "Be brief."}, user("Who?"), assistant("a")],
        "several answers to one question": [user("What?"), assistant("a"), assistant("b")],
        "nobody asks anything": [assistant("a")],
        "a conversation ends without an answer": [user("What?")],
        "a part of messages is no text and no image": [user([part(type="audio", audio="a.wav")]), assistant("a")],
        "a turn of messages has no speaker or no text": [user(None), assistant("a")],
        "image tags and images differ": [user("<image><image>What?"), assistant("a")],
        "messages is no list of turns": 7,
    }  # fmt: skip
    rows = [good, *({"messages": messages, "rejected_response": "b", "images": ["0.png"]} for messages in bad.values())]
    made, counts = read(tmp_path, rows, "ms-swift")
    assert len(made) == 1
    assert counts.dropped == dict.fromkeys(bad, 1)


def test_a_rejected_response_about_other_images_or_another_question_makes_no_pair(tmp_path):
    base = {"messages": [user("<image>What?"), assistant("a")], "images": ["0.png"]}
    rows = [
        base | {"rejected_messages": [user("<image>What?"), assistant("b")]},
        base | {"rejected_messages": [user("<image>What?"), assistant("b")], "rejected_images": ["1.png"]},
        base | {"rejected_messages": [user("<image>Who?"), assistant("b")]},
    ]
    made, counts = read(tmp_path, rows)
    assert len(made) == 1
    assert counts.dropped == {
        "the rejected response is about other images": 1,
        "the two conversations ask different things": 1,
    }


def test_text_of_a_response_that_looks_like_an_image_stays_text(tmp_path):
    [pair], _ = read(tmp_path, [{"messages": [user("<image>What?"), assistant("<image> A.")], "images": ["0.png"], "rejected_response": "<img>x</img>"}])  # fmt: skip
    assert (reply(pair, "chosen"), reply(pair, "rejected")) == ("<image> A.", "<img>x</img>")


def test_own_questions_come_back_with_every_field(tmp_path):
    first = {
        "id": "q1",
        "question": "And what colour is it?",
        "images": ["0.png"],
        "answer": "red",
        "answer_kind": "contains",
        "absent_objects": ["dog"],
        "system": "Answer in one word.",
        "history": [user("<image>What is it?"), assistant("A ball.")],
        "meta": {"src": "x", "n": 3},
    }
    second = {"id": "q2", "question": "What happens?", "video": "frames", "answer": "they run"}
    # Which of several files it is from is not for a file to say.
    assert first.keys() | second.keys() | {"source"} == set(Question.model_fields)
    save_pictures(tmp_path / "frames", 2)
    made, counts = read(tmp_path, [first, second])
    assert made == [first, second]
    assert counts.unused == {}
    again = imported(tmp_path / "out/questions.jsonl", tmp_path / "again", image_root=tmp_path)
    assert again.path.read_bytes() == (tmp_path / "out/questions.jsonl").read_bytes()


def test_own_pairs_come_back_with_every_field(tmp_path):
    pair = {
        "id": "r1/q1/0",
        "images": ["0.png", "1.png"],
        "prompt": [
            {"role": "system", "content": [part(type="text", text="Be brief.")]},
            user([part(type="image"), part(type="text", text="First?")]),
            assistant([part(type="text", text="yes")]),
            user([part(type="text", text="And "), part(type="image"), part(type="text", text="?")]),
        ],
        "chosen": [assistant([part(type="text", text="a")])],
        "rejected": [assistant([part(type="text", text="b")])],
        "margin": 0.5,
        "rewards": {"chosen": 0.75, "rejected": 0.25},
        "question_id": "q1",
        "responses": {"chosen": 3, "rejected": 0},
        "meta": {"src": "x"},
    }
    assert pair.keys() == set(Pair.model_fields)
    made, counts = read(tmp_path, [pair, pair | {"id": "r1/q2/0", "question_id": "q2", "images": ["1.png", "2.png"]}])
    assert made[0] == pair
    assert (counts.unused, counts.written) == ({}, 2)
    questions = imported(tmp_path / "out/pairs.jsonl", tmp_path / "q", make="questions", image_root=tmp_path)
    assert [question.id for question in read_jsonl(questions.path, Question)] == ["q1", "q2"]
    assert questions.counts.unused == dict.fromkeys(["chosen", "rejected", "margin", "rewards", "responses"], 2)


def test_an_answer_is_unused_where_pairs_are_made(tmp_path):
    rows = [{"question": "What?", "image": "0.png", "chosen": "a", "rejected": "b", "answer_gt": "a"}]
    assert read(tmp_path, rows)[1].unused == {"answer_gt": 1}
    assert read(tmp_path, rows, make="questions")[0][0]["answer"] == "a"


def listing(tmp_path, **entries):
    save_pictures(tmp_path, 2)
    return write_json(tmp_path / "dataset_info.json", entries)


def test_a_listing_of_llama_factory_says_how_columns_and_speakers_are_called(tmp_path):
    turns = [{"who": "sys", "text": "Be brief."}, {"who": "me", "text": "<image>What is this?"}]
    sides = {"better": {"who": "you", "text": KITTEN}, "worse": {"who": "you", "text": PUPPY}}
    write_jsonl(tmp_path / "chat.jsonl", [{"dialog": turns, "pics": ["0.png"], **sides}])
    write_json(tmp_path / "alpaca.json", [{"ask": "What is this?", "pics": ["1.png"], "good": KITTEN, "bad": PUPPY}])
    columns = {"chosen": "better", "rejected": "worse", "images": "pics"}
    tags = {"role_tag": "who", "content_tag": "text", "user_tag": "me", "assistant_tag": "you", "system_tag": "sys"}
    source = listing(
        tmp_path,
        chat={"file_name": "chat.jsonl", "formatting": "sharegpt", "ranking": True, "columns": {"messages": "dialog", **columns}, "tags": tags},
        table={"file_name": "alpaca.json", "ranking": True, "columns": {"prompt": "ask", "chosen": "good", "rejected": "bad", "images": "pics"}},
    )  # fmt: skip
    for name, options in (("file", {}), ("folder", {}), ("one", {"subset": "table"})):
        done = imported(tmp_path if name == "folder" else source, tmp_path / "o" / name, **options)
        pairs = lines(done.path)
        assert [asked(pair)[-1:] for pair in pairs] == [WHAT] * (1 if name == "one" else 2)
        assert {(reply(pair, "chosen"), reply(pair, "rejected")) for pair in pairs} == {(KITTEN, PUPPY)}
    assert asked(lines(tmp_path / "o/file/pairs.jsonl")[0])[0] == ("system", ["Be brief."])


def test_a_listing_may_name_a_folder_and_says_that_it_samples_nothing(tmp_path, caplog):
    row = {"instruction": "What is this?", "chosen": KITTEN, "rejected": PUPPY}
    for number in range(2):
        write_json(tmp_path / "parts" / f"{number}.json", [row | {"images": [f"{number}.png"]}])
    source = listing(tmp_path, mine={"file_name": "parts", "ranking": True, "num_samples": 1})
    done = imported(source, tmp_path / "out")
    assert [pair["images"] for pair in lines(done.path)] == [["0.png"], ["1.png"]]
    assert set(done.counts.formats.values()) == {"alpaca"}
    assert "num_samples of 'mine' is not used" in caplog.text


def test_what_turns_hold_besides_is_said_to_be_unused(tmp_path):
    thinking = {"role": "assistant", "content": KITTEN, "reasoning_content": "It has fur.", "name": None}
    row = {"messages": [user("<image>What is this?"), thinking], "images": ["0.png"], "rejected_response": PUPPY}
    assert read(tmp_path / "swift", [row])[1].unused == {"messages: reasoning_content": 1}
    pair = {"prompt": [user("What is this?")], "image": "0.png", "chosen": [thinking], "rejected": [assistant(PUPPY)]}
    assert read(tmp_path / "trl", [pair])[1].unused == {"chosen: reasoning_content": 1}


def test_a_listing_that_leads_away_is_refused(tmp_path):
    (tmp_path / "data/lf").mkdir(parents=True)
    write_jsonl(tmp_path / "secret.jsonl", [{"question": "What?"}])
    for path in ("../../secret.jsonl", str(tmp_path / "secret.jsonl")):
        source = write_json(tmp_path / "data/lf/dataset_info.json", {"x": {"file_name": path}})
        with pytest.raises(UserError, match="which lies outside"):
            imported(source, tmp_path / "out")
        meta = write_json(tmp_path / "data/lf/meta.json", {"x": {"root": ".", "annotation": path}})
        with pytest.raises(UserError, match="which lies outside"):
            imported(meta, tmp_path / "out")
    hub = write_json(tmp_path / "data/lf/dataset_info.json", {"x": {"hf_hub_url": "a/b"}})
    with pytest.raises(UserError, match="'x' is not a file beside it"):
        imported(hub, tmp_path / "out")
    with pytest.raises(UserError, match="it lists no 'y'; --subset is one of x"):
        imported(hub, tmp_path / "out", subset="y")


def test_a_format_that_is_named_overrules_the_shape(tmp_path):
    row = {"instruction": "What?", "input": "Say.", "chosen": "a", "rejected": "b", "image": "0.png"}
    assert asked(read(tmp_path, [row])[0][0]) == [("user", ["<image>", "What?\nSay."])]
    made, counts = read(tmp_path, [row], "plain")
    assert asked(made[0]) == [("user", ["<image>", "What?"])]
    assert counts.unused == {"input": 1}


def test_rows_of_no_known_shape_are_refused_with_their_columns(tmp_path):
    with pytest.raises(
        UserError, match=r"no known format has the columns text, label; name the columns with --columns"
    ):
        read(tmp_path, [{"text": "a", "label": 1}])


def test_a_bad_first_row_does_not_decide_the_format(tmp_path):
    good = SHAPES[2][1]
    made, counts = read(tmp_path, ["{torn", {"id": 1}, good, good | {"rejected_response": "c"}])
    assert (list(counts.formats.values()), len(made)) == (["ms-swift"], 2)


def test_files_of_a_folder_that_make_different_things_are_not_mixed(tmp_path):
    save_pictures(tmp_path, 1)
    write_jsonl(tmp_path / "in/a.jsonl", [{"question": "What?"}])
    write_json(tmp_path / "in/b.json", [{"question": "Who?", "chosen": "a", "rejected": "b"}])
    with pytest.raises(UserError, match=r"b\.json has preferences, .*a\.jsonl has none"):
        imported(tmp_path / "in", tmp_path / "out")
    assert imported(tmp_path / "in", tmp_path / "out", make="questions").counts.written == 2


def test_every_format_says_what_it_is():
    assert all(format_.about for format_ in FORMATS.values())


def test_import_json_keeps_the_reader_and_the_columns(tmp_path):
    read(tmp_path, [{"question": "What?", "image": "0.png", "note": "x", "answer": float("nan")}])
    kept = json.loads((tmp_path / "out/import.json").read_text())
    assert kept["formats"] == {str(tmp_path / "rows.jsonl"): "plain"}
    assert kept["columns"] == {"question": {"question": 1}, "image": {"images": 1}}
    assert kept["unused"] == {"note": 1}


def test_a_table_that_names_a_column_twice_is_refused_and_its_missing_values_are_none(tmp_path):
    save_pictures(tmp_path, 3)
    table = tmp_path / "rows.csv"
    table.write_text("question,image,question\nWhy?,0.png,What?\n")
    with pytest.raises(UserError, match="two columns are called 'question'"):
        imported(table, tmp_path / "out")
    table.write_text("question,image,answer\nWhy?,0.png,nan\nWho?,1.png,NaN\nWhat?,2.png,None\n")
    found = lines(imported(table, tmp_path / "out").path)
    assert [line.get("answer") for line in found] == [None, None, "None"]
    table.write_bytes("question,image\nWas für ein Bild?,0.png\n".encode("latin-1"))
    with pytest.raises(UserError, match="save it as UTF-8"):
        imported(table, tmp_path / "out")


def test_an_image_that_stands_in_a_source_is_taken(tmp_path):
    data = base64.b64encode(png(0)).decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    row = {"messages": [user([part(type="image", source=source), part(type="text", text="What is this?")])]}
    (found,), _ = read(tmp_path, [row])
    assert len(found["images"]) == 1
    assert found["question"] == "<image>What is this?"


def test_marks_for_what_is_not_read_are_no_text(tmp_path):
    rows = [
        {"messages": [user("<image>Where is <ref-object>?"), assistant("<bbox>")], "images": ["0.png"], "objects": {"ref": ["a"], "bbox": [[1, 2, 3, 4]]}, "rejected_response": PUPPY},
        {"messages": [user("<image><audio>Who speaks?"), assistant(KITTEN)], "images": ["0.png"], "audios": ["a.wav"], "rejected_response": PUPPY},
        {"messages": [user("<image>What does <bbox> mean here?"), assistant(KITTEN)], "images": ["0.png"], "rejected_response": PUPPY},
    ]  # fmt: skip
    made, counts = read(tmp_path, rows)
    assert [asked(pair) for pair in made] == [[("user", ["<image>", "What does <bbox> mean here?"])]]
    assert counts.dropped == {
        "<ref-object> stands for something that is not read": 1,
        "<audio> stands for something that is not read": 1,
    }


def test_a_query_with_marks_for_boxes_is_left_out(tmp_path):
    boxes = {"objects": {"ref": [], "bbox": [[1, 2, 3, 4]]}}
    row = {"query": "<image>Where?", "response": "<bbox>", "rejected_response": PUPPY, "images": ["0.png"]}
    made, counts = read(tmp_path, [row | boxes, row])
    assert len(made) == 1
    assert counts.dropped == {"<bbox> stands for something that is not read": 1}
