"""`align data` as it is typed: what it says, and that `align init` takes what it names next."""

import shlex

from typer.testing import CliRunner

from align.cli import app
from align.config import find_config, load_config
from tests.data.sources import save_pictures, write_jsonl


def run(command):
    return CliRunner().invoke(app, shlex.split(command))


def test_the_command_says_how_the_rows_were_read_and_what_comes_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "in", 2)
    rows = [{"question": f"{n}?", "image": f"{n}.png", "chosen": "a", "rejected": "b", "note": "x"} for n in range(2)]
    write_jsonl(tmp_path / "in/a.jsonl", [*rows, "{torn"])
    done = run("data in/a.jsonl --out out")
    assert done.exit_code == 0
    assert done.output.splitlines() == [
        "2 of 3 rows -> out/pairs.jsonl",
        "read as plain",
        "columns: chosen -> chosen; rejected -> rejected; question -> question; image -> images",
        "not used: note (2)",
        "left out: no valid JSON (1); see import.json",
        "images count from in",
        "next: align init --pairs out/pairs.jsonl --image-root in",
    ]
    following = done.output.splitlines()[-1].removeprefix("next: align ")
    assert run(f"{following} --policy policy").exit_code == 0
    config = load_config(find_config(None), [])
    assert config.question_images.resolve() == tmp_path / "in"


def test_a_recipe_takes_the_folder_of_the_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("init --recipe valley2-dpo --policy policy --pairs pairs.jsonl --image-root pictures").exit_code == 0
    assert load_config(find_config(None), []).question_images.resolve() == tmp_path / "pictures"
