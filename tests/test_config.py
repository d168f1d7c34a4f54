import re

import pytest
import yaml

from align.config import RENAMED, build_config, commented_config, dump_config, find_config, load_config
from align.errors import UserError
from align.run.folder import RunDir

MINIMAL = "policy: ./policy\nquestions: questions.jsonl\n"


def write(tmp_path, text):
    path = tmp_path / "align.yaml"
    path.write_text(text)
    return path


def test_relative_paths_count_from_the_file(tmp_path):
    config = load_config(write(tmp_path, MINIMAL + "evaluate: {questions: eval.jsonl}\n"))
    assert config.questions == tmp_path / "questions.jsonl"
    assert config.policy == str(tmp_path / "policy")
    assert config.run_dir == tmp_path / "runs" / "run"
    assert config.question_images == tmp_path
    assert config.evaluate.questions == tmp_path / "eval.jsonl"


def test_a_hub_id_stays_one_and_a_missing_folder_stays_a_path(tmp_path):
    assert build_config({"policy": "org/model", "questions": "q"}, base=tmp_path).policy == "org/model"
    assert build_config({"policy": "./org", "questions": "q"}, base=tmp_path).policy == str(tmp_path / "org")


def test_all_faults_are_told_at_once_with_the_nearest_key(tmp_path):
    path = write(tmp_path, "policy: p\nsampel: {}\nsample: {num_response: 3, temperature: -1}\nrounds: three\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    text = str(caught.value)
    assert "sampel: unknown key (did you mean 'sample'?)" in text
    assert "sample.num_response: unknown key (did you mean 'num_responses'?)" in text
    assert "sample.temperature" in text
    assert "rounds" in text
    assert "questions: required" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy: [", r"not valid YAML: .*line 2, column 1"),
        ("- a\n", "expected keys and values, found list"),
        (MINIMAL + "seed: 1\nseed: 2\n", "'seed' is duplicated"),
        ("", "policy: required"),
        ("policy: !!python/object:os.system x\n", "not valid YAML"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path, text))


def test_overrides_reach_nested_keys_and_read_numbers(tmp_path):
    path = write(tmp_path, MINIMAL)
    config = load_config(path, ["dpo.learning_rate=5e-7", "sample.temperature=0", "dpo.freeze=[vision]", "rounds=2"])
    assert config.dpo.trainer_fields() == {"learning_rate": 5e-7}
    assert config.dpo.freeze == ["vision"]
    assert (config.sample.temperature, config.rounds) == (0, 2)


@pytest.mark.parametrize(
    ("override", "message"), [("rounds", "key=value"), ("rounds.x=1", "is a value"), ("a=[", "YAML")]
)
def test_bad_overrides_are_refused(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path, MINIMAL + "rounds: 1\n"), [override])


def test_the_commented_file_is_complete_and_loads(tmp_path):
    text = commented_config({"policy": "./p", "questions": "q.jsonl", "dpo": {"beta": 0.2}})
    config = load_config(write(tmp_path, text))
    assert config.dpo.trainer_fields() == {"beta": 0.2}
    assert config.model_dump(exclude={"policy", "questions", "run_root", "dpo"}) == build_config(
        {"policy": "p", "questions": "q"}, base=tmp_path
    ).model_dump(exclude={"policy", "questions", "run_root", "dpo"})
    keys = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    comments = [line for line in text.splitlines() if line.lstrip().startswith("#")]
    assert len(comments) >= len(keys)


def test_a_dumped_configuration_loads_to_the_same(tmp_path):
    config = load_config(write(tmp_path, MINIMAL + "dpo: {beta: 0.3, loss_type: [sigmoid, sft]}\n"))
    again = build_config(yaml.safe_load(dump_config(config)), base=tmp_path / "elsewhere")
    assert again == config


def test_a_missing_file_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="align init"):
        find_config(None)


def test_empty_means_the_default_but_not_inside_of_settings_handed_on(tmp_path):
    text = MINIMAL + "seed:\nsample:\n  top_k:\nmodel:\n  processor: {default_system: null, max_pixels: 5}\n"
    config = load_config(write(tmp_path, text))
    assert (config.seed, config.sample.top_k) == (0, 0)
    assert config.model.processor == {"default_system": None, "max_pixels": 5}


@pytest.mark.parametrize("old", RENAMED)
def test_a_key_that_was_renamed_names_its_new_one(tmp_path, old):
    section, key = old.split(".")
    path = tmp_path / "align.yaml"
    path.write_text(yaml.safe_dump({"policy": "./p", "questions": "q.jsonl", section: {key: 1}}))
    with pytest.raises(UserError, match=rf"{re.escape(old)}: is called {re.escape(RENAMED[old])} now"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name: 2024-13-45\n", r"not valid YAML: month must be in 1\.\.12"),
        ("? [a, b]\n: 1\n", r"not valid YAML: a key is no name \(line 1"),
        ("? {a: b}\n: 1\n", r"not valid YAML: a key is no name"),
        ("dpo: &a\n  lora: *a\n", r"not valid YAML: an alias inside of an anchored value \(line 2"),
        ("a: &a [x]\nb: &b [*a, *a]\n", r"not valid YAML: an alias inside of an anchored value \(line 2"),
        ("dpo: " + "[" * 3000 + "]" * 3000 + "\n", r"not valid YAML: nested too deep"),
        (MINIMAL + "name: ..\n", r"name: .*found '\.\.'"),
        (MINIMAL + "name: .\n", r"name: .*found '\.'"),
        (MINIMAL + "seed: 4294967296\n", r"seed: .*less than 4294967296"),
    ],
)
def test_yaml_that_is_hostile_or_odd_is_one_message(tmp_path, text, complaint):
    path = tmp_path / "align.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint):
        load_config(path)


def test_a_plain_alias_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "align.yaml"
    path.write_text("\ufeff" + MINIMAL + "sample: &same {temperature: 0.5}\n")
    assert load_config(path).sample.temperature == 0.5
    path.write_text(MINIMAL + "critic:\n  gates: &gates {max_position_bias: 0.3}\n  options: *gates\n")
    assert load_config(path).critic.options == {"max_position_bias": 0.3}


def test_a_persons_own_configuration_is_never_written_over(tmp_path):
    path = tmp_path / "align.yaml"
    path.write_text("# my comment\n" + MINIMAL)
    config = load_config(path, ["run_root=..", f"name={tmp_path.name}"])
    assert config.run_dir.resolve() == tmp_path.resolve()
    with pytest.raises(UserError, match=r"would write its own over it; give the run a folder of its own"):
        RunDir(config.run_dir).write_config_once(dump_config(config))
    assert path.read_text().startswith("# my comment")
    # What the message says works, and what was written by the toolkit is written anew until a stage has begun.
    config = load_config(path, ["name=own"])
    RunDir(config.run_dir).write_config_once(dump_config(config))
    RunDir(config.run_dir).write_config_once(dump_config(load_config(path, ["name=own", "seed=7"])))
    assert load_config(config.run_dir / "align.yaml").seed == 7


@pytest.mark.parametrize(
    "given",
    [
        "sample: {temperature: .inf}",
        "sample: {temperature: 1.0e400}",
        "sample: {top_p: .nan}",
        "pairs: {min_margin: .inf}",
        "critic: {gates: {min_consistency: .nan}}",
        "dpo: {projector_learning_rate_multiplier: .inf}",
        "questions: [{file: q.jsonl, weight: .inf}]",
    ],
)
def test_a_number_that_is_not_finite_is_refused(tmp_path, given):
    text = MINIMAL if not given.startswith("questions") else "policy: ./p\n"
    with pytest.raises(UserError, match=r"finite|greater than|less than"):
        load_config(write(tmp_path, text + given + "\n"))


def test_a_name_that_is_too_long_for_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="name: String should have at most 100 characters"):
        load_config(write(tmp_path, MINIMAL + f"name: {'x' * 300}\n"))
