"""`align run` starts and stops vLLM for policy and critic: the local engine's answers, no process left, whenever killed."""

import json
import os
import random
import shutil
import signal
import time

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from align.config import ModelSettings
from align.engines.base import SampleRequest, SamplingSettings
from align.engines.open import open_engine
from align.records import Evaluation, read_jsonl
from align.run.folder import RunDir
from align.status.stage_progress import LockHolder
from tests.patience import PATIENCE_S, wait_until
from tests.stage_runs import SETTINGS, Command, write_lines
from tests.tiny_models import random_image
from tests.vllm.byte_eagle import VOCABULARY, save_byte_eagle

pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed")

# More are a matter of patience: ALIGN_VLLM_KILLS=10.
NUM_KILLS = int(os.environ.get("ALIGN_VLLM_KILLS", "1"))
STAGES = ("sample", "score", "pairs", "dpo")
LONGEST = 6
PROMPT = """---
kind: pairwise
options: {first: a, second: b}
---
[{question}] a: [{first}] b: [{second}] a or b?
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Questions with no, one and two images for training and as held-out ones; a policy and another critic."""
    folder = tmp_path_factory.mktemp("loop") / "project"
    save_byte_eagle(folder / "policy", 0)
    save_byte_eagle(folder / "critic", 1)
    (folder / "images").mkdir()
    for index in range(2):
        random_image(index, 120 + 20 * index, 90).save(folder / f"images/{index}.png")
    images = ["images/0.png", "images/1.png"]
    for name, text in (("questions", "what is this"), ("eval", "and this")):
        write_lines(
            folder / f"{name}.jsonl",
            [{"id": f"q{count}", "question": text, "images": images[:count]} for count in range(3)],
        )
    (folder / "prompt.md").write_text(PROMPT)
    hosted = {"engine": "vllm"}
    settings = {
        "policy": "./policy",
        "questions": "questions.jsonl",
        "rounds": 2,
        "sample": {"num_responses": 2, "max_new_tokens": LONGEST, "temperature": 1.0, "top_p": 1.0} | hosted,
        "critic": {
            "model": "./critic",
            "prompt": "./prompt.md",
            "options": {"soft": True},
            "reliability_sample": 0,
        }
        | hosted,
        "pairs": {"keep_truncated": True},
        "dpo": SETTINGS["dpo"] | {"save_steps": 1},
        "server": {"top_logprobs": VOCABULARY},
        "vllm": {
            "max_model_len": 1024,
            "start_timeout_s": PATIENCE_S,
            "arguments": ["--enforce-eager", "--distributed-executor-backend", "uni"],
        },
    }
    (folder / "align.yaml").write_text(yaml.safe_dump(settings))
    return folder


EVALUATED = (
    *("--set", "evaluate.questions=eval.jsonl", "--set", "evaluate.engine=vllm"),
    *("--set", f"evaluate.max_new_tokens={LONGEST}", "--set", "evaluate.win_rate=false"),
)


def start(folder, *arguments):
    """`align run`, and vLLM with processes of its own, as where it is used."""
    return Command(folder, "run", *arguments, env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})


def processes_of(folder):
    """Everything that runs and names the project's folder, or runs in it: supervisors, servers, engines."""
    found = []
    for process in psutil.process_iter():
        try:
            is_there = process.status() != psutil.STATUS_ZOMBIE
            if is_there and (str(folder) in " ".join(process.cmdline()) or process.cwd() == str(folder)):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def undisturbed(project):
    """A run with evaluation."""
    folder = project.with_name("undisturbed")
    shutil.copytree(project, folder)
    ended = start(folder, *EVALUATED).end()
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


def stages_of(folder, number):
    return json.loads((folder / f"runs/run/round-{number}/manifest.json").read_text())["stages"]


def lines(folder, number, name):
    return [json.loads(line) for line in (folder / f"runs/run/round-{number}/{name}.jsonl").read_text().splitlines()]


def local_greedy(policy, questions, images):
    engine = open_engine(str(policy), ModelSettings(), open_image=lambda name: images[name])
    found = {}
    engine.sample(
        [SampleRequest(one.id, one.messages(), tuple(one.images), 1, 0) for one in questions],
        SamplingSettings(temperature=0.0, max_new_tokens=LONGEST),
        lambda result: found.update({result.id: (result.texts[0], result.num_tokens[0])}),
    )
    return found


def test_a_run_starts_and_stops_vllm_for_every_stage_and_says_so(undisturbed):
    folder = undisturbed
    assert processes_of(folder) == []
    for number in (1, 2):
        stages = stages_of(folder, number)
        for name in ("sample", "score", "evaluate"):
            assert "1 started here" in stages[name]["notes"]["engine"]
            assert stages[name]["notes"]["prompts"].startswith("equal to the checkpoint's own processor: ")
        assert stages["score"]["counts"]["unscored"] == {}
        assert stages["pairs"]["counts"]["pairs"] > 0
        logs = folder / f"runs/run/round-{number}/servers"
        assert all((logs / f"{name}-0.log").stat().st_size for name in ("sample", "critic", "evaluate"))


def test_every_rounds_answers_at_temperature_0_are_the_local_engines(undisturbed):
    folder = undisturbed
    images = {f"images/{index}.png": random_image(index, 120 + 20 * index, 90) for index in range(2)}
    everything = []
    for number in (0, 1, 2):
        policy = folder / f"runs/run/round-{number}/checkpoint" if number else folder / "policy"
        evaluated = read_jsonl(folder / f"runs/run/round-{number}/evaluation.jsonl", Evaluation)
        served = {line.id: (line.greedy.text, line.greedy.num_tokens) for line in evaluated}
        assert served == local_greedy(policy, [line.question for line in evaluated], images)
        everything.append(served)
    assert everything[0] != everything[2], "two rounds should change something"


def moments(folder, count, seed=1):
    """Of a finished run: (round, stage, seconds into it) in their order.

    Every other one is drawn from the time of all stages together; the others from a stage that is drawn before, so that
    short ones have their turn: starting vLLM takes nearly all of the time of such a small run.
    """
    drawn = random.Random(seed)
    stages = [(number, name, stages_of(folder, number)[name]["seconds"]) for number in (1, 2) for name in STAGES]
    found = []
    for index in range(count):
        weights = [seconds if index % 2 else 1.0 for _, _, seconds in stages]
        (which,) = drawn.choices(range(len(stages)), weights)
        found.append((which, drawn.uniform(0, stages[which][2])))
    return [(*stages[which][:2], seconds) for which, seconds in sorted(found)]


def at_work(folder):
    """The round and the stage that a process works on now, or the last that there is a trace of."""
    for this in reversed(RunDir(folder / "runs/run").rounds()):
        if (stage := LockHolder.of(this).stage) is not None:
            return this.number, stage
    return None


def kill_within(folder, number, stage, seconds):
    """Run on, and kill the run so long after the stage has begun (or after the start, where it had begun before).

    Returns what was killed, or None where the run has ended before.
    """
    process = start(folder)
    manifest = RunDir(folder / "runs/run").round(number).manifest
    wait_until(lambda: process.poll() is not None or manifest.stage(stage) is not None)
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    alive, began = len(processes_of(folder)), time.monotonic()
    ended = process.end()
    assert ended.returncode in (0, -signal.SIGKILL), ended.stderr[-3000:]
    wait_until(lambda: not processes_of(folder))
    if ended.returncode == 0:
        return None
    return f"{at_work(folder)}: {alive} processes, gone after {time.monotonic() - began:.1f} s"


def test_a_run_that_is_killed_at_random_moments_leaves_no_process_and_ends_equal(project, undisturbed):
    """One run that is killed again and again, and goes on each time with the same command."""
    folder = project.with_name("killed")
    shutil.copytree(project, folder)
    killed = [kill_within(folder, *moment) for moment in moments(undisturbed, NUM_KILLS)]
    print(*killed, sep="\n")
    assert any(killed)
    ended = start(folder).end()
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert processes_of(folder) == []
    assert_equal(undisturbed, folder)


def assert_equal(whole, folder):
    for number in (1, 2):
        assert lines(folder, number, "samples") == lines(whole, number, "samples")
        rewards, expected = ([line["rewards"] for line in lines(each, number, "scores")] for each in (folder, whole))
        assert rewards == [pytest.approx(row, abs=1e-4) for row in expected]
        chosen, others = (
            [(one["chosen"], one["rejected"]) for one in lines(each, number, "pairs")] for each in (folder, whole)
        )
        assert chosen == others
        found, weights = (
            load_file(each / f"runs/run/round-{number}/checkpoint/model.safetensors") for each in (folder, whole)
        )
        assert found.keys() == weights.keys()
        assert all((found[name] - weights[name]).abs().max() < 1e-5 for name in weights)
