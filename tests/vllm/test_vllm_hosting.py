"""A stage that starts vLLM itself: the same responses as from this process, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from tests.models import tiny_valley
from tests.stage_runs import write_lines
from tests.tiny_models import random_image
from tests.vllm.test_random_models import EAGLE, WIDE

pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed")

PATIENCE_S = 900


@pytest.fixture
def project(tmp_path):
    """Three questions with no, one and two images; greedy by `top_k: 1`, since a stage refuses temperature 0."""
    tiny_valley.folder(tmp_path / "policy", **WIDE, eagle_vision_config=EAGLE)
    (tmp_path / "images").mkdir()
    for index in range(2):
        random_image(index, 120 + 20 * index, 90).save(tmp_path / f"images/{index}.png")
    images = ["images/0.png", "images/1.png"]
    questions = [{"id": f"q{count}", "question": "what is this", "images": images[:count]} for count in range(3)]
    write_lines(tmp_path / "questions.jsonl", questions)
    settings = {
        "policy": "./policy",
        "questions": "questions.jsonl",
        "sample": {"num_responses": 2, "max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "top_k": 1},
        "vllm": {
            "max_model_len": 2048,
            "start_timeout_s": PATIENCE_S,
            "arguments": ["--enforce-eager", "--distributed-executor-backend", "uni"],
        },
    }
    (tmp_path / "align.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def command(*arguments):
    return [sys.executable, "-m", "align.cli", *arguments]


def environment():
    # Each process of its own here, as where it is used.
    return {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}


def texts(folder):
    lines = (folder / "runs/run/round-1/samples.jsonl").read_text().splitlines()
    return {line["id"]: [one["text"] for one in line["responses"]] for line in map(json.loads, lines)}


def processes_of(folder):
    """Everything that runs and names the project's folder: supervisors, servers, engines."""
    found = []
    for process in psutil.process_iter():
        try:
            is_there = process.status() != psutil.STATUS_ZOMBIE
            if is_there and (str(folder) in " ".join(process.cmdline()) or process.cwd() == str(folder)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_stage_on_vllm_gives_the_local_engines_responses_and_leaves_no_process(project):
    done = subprocess.run(
        command("sample", "--set", "sample.engine=vllm"), cwd=project, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert processes_of(project) == []
    served = texts(project)
    stage = json.loads((project / "runs/run/round-1/manifest.json").read_text())["stages"]["sample"]
    assert "1 started here" in stage["notes"]["engine"]
    kinds = "1 with no image, 1 with one image, 1 with several images"
    assert stage["notes"]["prompts"] == f"equal to the checkpoint's own processor: {kinds}"
    assert (project / "runs/run/round-1/servers/sample-0.log").read_text()
    (project / "runs").rename(project / "served")
    done = subprocess.run(
        command("sample", "--set", "sample.engine=local"), cwd=project, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert texts(project) == served
    assert any(any(responses) for responses in served.values())


def test_a_stage_that_is_killed_leaves_no_vllm_behind(project):
    stage = subprocess.Popen(command("sample", "--set", "sample.engine=vllm"), cwd=project, env=environment())
    deadline = time.monotonic() + PATIENCE_S
    # The supervisor, the server and, once it has begun, its engine.
    while len(processes_of(project)) < 4:
        assert stage.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.5)
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    while processes_of(project):
        assert time.monotonic() < deadline
        time.sleep(0.5)
