"""Every case of the corpus (`tests.bad_cases`) gives its message in `align check` and in the stage itself."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from align.check.contamination import run_check
from align.check.preflight import needed_bytes, run_preflight
from align.config import Config, find_config, load_config
from align.distributed.launch import launch_command
from align.errors import UserError
from align.loop import run_stage
from align.records import Question, Response, Samples, read_jsonl, write_jsonl
from align.run.folder import RunDir
from tests.bad_cases import CASES, Bad, pair
from tests.stage_runs import SETTINGS, align, make_project


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A project that runs, with complete samples and pairs of round 1 for the stages behind them."""
    return make_project(tmp_path_factory.mktemp("good"))


def put_round(folder: Path, config: Config) -> None:
    this = RunDir(config.run_dir).round(1)
    this.path.mkdir(parents=True)
    responses = [Response(text=text, num_tokens=3) for text in ("a", "b", "c")]
    questions = read_jsonl(folder / "questions.jsonl", Question)
    write_jsonl(this.samples, [Samples(id=q.id, question=q, responses=responses, seed=0) for q in questions])
    this.manifest.begin("sample", settings={}, inputs={})
    this.manifest.finish("sample", outputs=[this.samples], counts={}, seconds=0.0)
    this.pairs.write_text(pair())


def broken(good: Path, folder: Path, bad: Bad) -> Path:
    """A copy of the good project with the case's changes."""
    shutil.copytree(good, folder)
    settings = yaml.safe_load(yaml.safe_dump(SETTINGS))
    for key, value in bad.settings.items():
        *sections, last = key.split(".")
        node = settings
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    (folder / "align.yaml").write_text(yaml.safe_dump(settings))
    for name, content in bad.files.items():
        path = folder / name
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def check(folder: Path) -> str:
    """What `align check` says of the project."""
    return run_preflight(load_config(find_config(folder / "align.yaml"))).text()


def stage(folder: Path, name: str) -> None:
    """What the run itself does, in this process."""
    config = load_config(find_config(folder / "align.yaml"))
    if name == "launch":
        launch_command(config.launch, [])
        return
    if name in ("score", "dpo"):
        put_round(folder, config)
    run_stage(config, name, 0 if name == "evaluate" else 1)


def test_the_corpus_has_sixty_cases_of_both_kinds():
    names = [bad.name for bad in CASES]
    assert len(names) == len(set(names)) >= 60
    assert sum("questions.jsonl" in bad.files or "pairs.jsonl" in bad.files for bad in CASES) >= 20


def test_the_project_that_the_cases_break_is_good(good):
    found = run_preflight(load_config(good / "align.yaml"))
    assert not found.problems, found.text()
    assert "4 questions with 4 images" in found.facts


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_what_is_wrong_is_said_by_check_and_by_the_stage(good, tmp_path, bad, caplog):
    folder = broken(good, tmp_path / "project", bad)
    if bad.stage == "config":
        with pytest.raises(UserError, match=bad.says):
            check(folder)
        return
    said = check(folder)
    assert re.search(bad.says, said, re.DOTALL), said
    with pytest.raises(UserError) as fault:
        stage(folder, bad.stage)
    # What is left out line by line is reported as a warning before the stage ends.
    everything = "\n".join([str(fault.value), *caplog.messages])
    assert re.search(bad.says, everything, re.DOTALL), everything


def test_all_problems_stand_on_one_screen(good, tmp_path):
    bad = Bad(
        "many",
        "",
        "",
        {"policy": "./nobody", "critic.kind": "pairwise", "dpo.learnin_rate": 1, "launch.machine_rank": 2},
        {"questions.jsonl": "[1]\n{\n", "eval.jsonl": ""},
    )
    found = run_preflight(load_config(broken(good, tmp_path / "project", bad) / "align.yaml"))
    assert [problem.area for problem in found.problems] == [
        "data", "data", "evaluation", "policy", "critic", "dpo", "launch"
    ]  # fmt: skip
    assert "questions.jsonl:1" in found.text()
    assert "questions.jsonl:2" in found.text()


def test_the_command_ends_with_exit_code_2_and_no_traceback(good, tmp_path):
    bad = Bad("two", "", "", {"dpo.learnin_rate": 1, "launch.machine_rank": 2})
    done = align(broken(good, tmp_path / "project", bad), "check")
    assert done.returncode == 2
    assert "error: 2 problems" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_torn_image_is_found_by_decoding_it(good, tmp_path):
    torn = (good / "images/0.png").read_bytes()[:900]
    folder = broken(good, tmp_path / "project", Bad("torn", "", "", files={"images/0.png": torn}))
    config = load_config(folder / "align.yaml")
    assert not run_preflight(config).problems
    found = run_preflight(config, decode=True)
    assert [problem.area for problem in found.problems] == ["data"]
    assert "'images/0.png' cannot be decoded" in found.text()
    done = align(folder, "check")
    assert done.returncode == 2
    assert "1 images cannot be read" in done.stderr


def test_a_disk_too_small_for_every_round_s_checkpoint_is_told(good, tmp_path):
    # Ten million rounds of 212,600 bytes are 2 TB.
    folder = broken(good, tmp_path / "project", Bad("disk", "", "", {"rounds": 10_000_000}))
    found = run_preflight(load_config(folder / "align.yaml"))
    assert [problem.area for problem in found.problems] == ["disk"]
    assert re.search(r"the run needs about \d+\.\d GiB \(a checkpoint a round\)", found.text())


def test_what_a_run_writes_is_a_checkpoint_a_round_and_two_states(good, tmp_path):
    config = load_config(good / "align.yaml")
    checkpoint = (good / "policy/model.safetensors").stat().st_size
    three, two = needed_bytes(config.model_copy(update={"rounds": 3})), needed_bytes(config)
    # The file's header is not counted; what is sampled is 4 questions x 3 responses x 8 tokens.
    assert three - two == pytest.approx(checkpoint, rel=0.05)
    lora = config.model_copy(update={"dpo": config.dpo.model_copy(update={"lora": {"r": 4}})})
    assert two - needed_bytes(lora) == pytest.approx(2 * 3 * checkpoint, rel=0.05)


def test_a_torn_held_out_image_is_told(good, tmp_path):
    torn = (good / "images/4.png").read_bytes()[:900]
    folder = broken(good, tmp_path / "project", Bad("torn", "", "", files={"images/4.png": torn}))
    with pytest.raises(UserError, match=r"question 'q4': image cannot be read: .*images/4\.png"):
        run_check(load_config(folder / "align.yaml"))
