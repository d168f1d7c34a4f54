"""Trackers: what was logged is read back from TensorBoard's, wandb's and MLflow's own files; nothing secret is."""

from __future__ import annotations

import json
import struct

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from align.check.preflight import run_preflight
from align.config import build_config, load_config
from align.errors import UserError
from align.loop import run_stage
from align.run.folder import RunDir
from align.secrets import without_secrets
from align.tracking import trackers as module
from align.tracking.stage_metrics import stage_metrics
from align.tracking.trackers import OF_TRANSFORMERS, PACKAGES, check_trackers, tracker_names, tracking
from tests.stage_runs import SETTINGS, make_project

KEY = "0123456789abcdef0123456789abcdef01234567"
PASSWORD = "opensesame"


def config_of(folder, report_to="tensorboard", **dpo):
    data = {"policy": "p", "questions": "q.jsonl", "name": "mine", "dpo": {"report_to": report_to} | dpo}
    return build_config(data, base=folder)


def curves(folder):
    """Tag -> [(step, value)] of TensorBoard's event files in a folder."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wandb_records(path):
    """The records of wandb's file: LevelDB's log format, blocks of 32 KiB, behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def wandb_runs(folder):
    """Name -> (id, [what was logged]) of wandb's offline runs."""
    found = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        name, logged = "", []
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "run":
                name = record.run.display_name
                id_ = record.run.run_id
            if record.WhichOneof("record_type") == "history":
                logged.append(
                    {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                )
        found.setdefault(name, (id_, []))[1].extend(logged)
    return found


def test_none_one_and_several_trackers_can_be_named(tmp_path):
    assert tracker_names(build_config({"policy": "p", "questions": "q"}, base=tmp_path)) == ["tensorboard"]
    assert tracker_names(config_of(tmp_path, "none")) == []
    assert tracker_names(config_of(tmp_path, ["wandb", "mlflow", "wandb"])) == ["wandb", "mlflow"]
    for wrong in ("wandbb", "all", ["tensorboard", "wandbb"]):
        with pytest.raises(UserError, match=r"dpo.report_to: '\w+' is no tracker; expected none, or one or several"):
            tracker_names(config_of(tmp_path, wrong))


def test_all_names_of_transformers_are_known():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(INTEGRATION_TO_CALLBACK) == {*PACKAGES, *OF_TRANSFORMERS}


def test_a_missing_package_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(module.PACKAGES, "wandb", ("no-such-package",))
    # The folder that wandb leaves in the current one is no package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="names wandb, but the package no-such-package is not installed; pip install"):
        check_trackers(config_of(tmp_path, "wandb"))
    config = load_config(make_project(tmp_path / "project", dpo={"report_to": "trackio"}) / "align.yaml")
    missing = "dpo.report_to names trackio, but its package is not installed"
    assert [problem.text.partition(";")[0] for problem in run_preflight(config).problems] == [missing]
    with pytest.raises(UserError, match=missing):
        run_stage(config, "dpo", 1)
    config.dpo.report_to = "tensorbord"
    with pytest.raises(UserError, match="'tensorbord' is no tracker"):
        run_stage(config, "sample", 1)
    assert not (config.run_dir / "round-1/samples.part-0.jsonl").exists()


def test_a_training_that_goes_on_leaves_one_curve(tmp_path):
    config = config_of(tmp_path)
    for begin, end in ((0, 5), (3, 7)):
        with tracking(config, "round-1") as trackers:
            trackers.resume_after(begin)
            for step in range(begin + 1, end + 1):
                trackers.log({"train/loss": 10.0 * begin + step}, step)
    steps = curves(tmp_path / "runs/mine/tensorboard/round-1")["train/loss"]
    # Steps 4 and 5 were done again.
    assert steps == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 34.0), (5, 35.0), (6, 36.0), (7, 37.0)]


def test_a_tracker_that_fails_on_the_way_is_given_up_and_the_others_go_on(tmp_path):
    with tracking(config_of(tmp_path), "round-1") as trackers:

        class Broken:
            def log(self, numbers, step):
                raise ConnectionError(f"cannot reach https://me:{PASSWORD}@host/path?token={KEY}")

        trackers.open["mlflow"] = Broken()
        trackers.log({"train/loss": 1.0}, 1)
        trackers.log({"train/loss": 2.0}, 2)
        note = trackers.notes["tracking with mlflow"]
    assert note == "given up: ConnectionError: cannot reach https://***@host/path?token=***"
    assert curves(tmp_path / "runs/mine/tensorboard/round-1") == {"train/loss": [(1, 1.0), (2, 2.0)]}


def test_a_server_that_is_not_there_is_told_without_its_password(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with (
        pytest.raises(UserError, match=r"mlflow cannot be opened: .*; check MLFLOW_TRACKING_URI") as error,
        tracking(config_of(tmp_path, "mlflow"), "round-1"),
    ):
        pass
    assert PASSWORD not in str(error.value)
    assert "http://***@127.0.0.1:9" in str(error.value)


def test_secrets_of_the_environment_are_left_out(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("SOME_TOKEN", "of")
    assert without_secrets(f"login of {KEY} failed") == "login of *** failed", "short values are words"


def test_a_run_is_read_back_from_all_three_and_no_secret_from_any_file(tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    dpo = SETTINGS["dpo"] | {"report_to": ["tensorboard", "wandb", "mlflow"], "gradient_accumulation_steps": 1}
    config = load_config(make_project(tmp_path / "project", dpo=dpo) / "align.yaml", ["name=mine", "rounds=1"])
    for stage in ("sample", "score", "pairs", "dpo", "evaluate"):
        run_stage(config, stage, 1)
    # A stage that is complete has nothing more to tell.
    run_stage(config, "sample", 1)
    this = RunDir(config.run_dir).round(1)
    state = json.loads((this.checkpoint / "trainer_state.json").read_text())
    losses = [(line["step"], pytest.approx(line["loss"])) for line in state["log_history"] if "loss" in line]
    assert len(losses) >= 2
    rounds = stage_metrics(this, "sample") | stage_metrics(this, "evaluate") | stage_metrics(this, "score")
    assert rounds["sample/responses"] == 12
    assert {"score/reward_mean", "evaluate/sampled_accuracy", "evaluate/sampled_accuracy_low"} <= rounds.keys()

    board = config.run_dir / "tensorboard"
    assert curves(board / "round-1")["train/loss"] == losses
    assert {"train/rewards/margins", "train/rewards/chosen", "train/learning_rate"} <= curves(board / "round-1").keys()
    found = curves(board / "rounds")
    assert {name: found[name] for name in rounds} == {
        name: [(1, pytest.approx(value))] for name, value in rounds.items()
    }

    at_wandb = wandb_runs(config.run_dir)
    assert set(at_wandb) == {"mine round-1", "mine rounds"}
    logged = at_wandb["mine round-1"][1]
    assert [(line["train/global_step"], line["train/loss"]) for line in logged if "train/loss" in line] == losses
    (samples,) = [line for line in at_wandb["mine rounds"][1] if "sample/responses" in line]
    assert (samples["round"], samples["sample/responses"]) == (1, 12)

    client = MlflowClient()
    runs = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("mine").experiment_id])}
    assert {name: run.info.status for name, run in runs.items()} == {
        "mine round-1": "FINISHED",
        "mine rounds": "FINISHED",
    }
    history = client.get_metric_history(runs["mine round-1"].info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == losses
    assert runs["mine round-1"].data.params["dpo.learning_rate"] == "0.001"
    assert runs["mine rounds"].data.metrics["score/scored"] == 12

    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 30
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in "".join(capfd.readouterr())
