"""The stages on servers, through the command line: sampled, judged, evaluated; servers that die cost no question."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from align.config import load_config
from align.loop import run_stage
from tests.engines.stub_server import KEY, Reply, StubServer, completion, is_probe, question_text
from tests.stage_runs import align, make_project, write_lines

NUM_QUESTIONS = 60


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    # The stub counts no tokens of a model's.
    folder = make_project(tmp_path_factory.mktemp("project"), server={"compare_prompts": False})
    questions = [
        {"id": f"q{index}", "question": f"What is {index}?", "images": [f"images/{index % 4}.png"], "answer": "4"}
        for index in range(NUM_QUESTIONS)
    ]
    write_lines(folder / "questions.jsonl", questions)
    return folder


@pytest.fixture
def fresh(project, tmp_path):
    return shutil.copytree(project, tmp_path / "project")


@contextlib.contextmanager
def stub_process(folder, *, service_s=0.02, dies_at=0):
    """A stub server in a process of its own; yields its address. It answers `dies_at` questions and then is gone."""
    port_file = folder / f"port-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "tests.engines.stub_server", str(port_file), str(service_s), str(dies_at)]
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    process = subprocess.Popen(command, cwd=root, env=os.environ | {"PYTHONPATH": root})
    try:
        while not port_file.exists():
            assert process.poll() is None
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port_file.read_text()}"
    finally:
        process.kill()
        process.wait()


def on(stage, *urls, model="policy", **limits):
    servers = ", ".join(f"{{url: '{url}', model: '{model}'}}" for url in urls)
    limits = {"backoff_s": 0.02, "cooldown_s": 0.2, "concurrency": 4} | limits
    return [
        *("--set", f"{stage}.servers=[{servers}]"),
        *(part for name, value in limits.items() for part in ("--set", f"server.{name}={value}")),
    ]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples_of(folder):
    return lines(folder / "runs/run/round-1/samples.jsonl")


def test_an_endpoint_that_dies_in_the_middle_costs_no_question(fresh, tmp_path):
    with stub_process(tmp_path, dies_at=10) as dying, stub_process(tmp_path) as well:
        result = align(fresh, "sample", *on("sample", dying, well))
    assert result.returncode == 0, result.stderr
    assert f"taken out: {dying}/v1" in result.stderr
    found = samples_of(fresh)
    assert [line["id"] for line in found] == [f"q{index}" for index in range(NUM_QUESTIONS)]
    for line in found:
        texts = [response["text"] for response in line["responses"]]
        assert len(set(texts)) == 3
        assert all(line["question"]["question"] in text for text in texts)
    entry = json.loads((fresh / "runs/run/round-1/manifest.json").read_text())["stages"]["sample"]
    assert entry["counts"]["responses"] == 3 * NUM_QUESTIONS
    assert entry["inputs"]["served as"] == "policy"
    assert well in entry["notes"]["servers"]


def test_when_all_servers_die_the_same_command_goes_on_with_others(fresh, tmp_path):
    with stub_process(tmp_path) as whole:
        assert align(fresh, "sample", *on("sample", whole)).returncode == 0
    uninterrupted = (fresh / "runs/run/round-1/samples.jsonl").read_bytes()
    shutil.rmtree(fresh / "runs")
    with stub_process(tmp_path, dies_at=8) as one, stub_process(tmp_path, dies_at=9) as other:
        stopped = align(fresh, "sample", *on("sample", one, other))
    assert stopped.returncode == 2
    assert "no server is left" in stopped.stderr
    assert f"{one}/v1: " in stopped.stderr
    assert f"{other}/v1: " in stopped.stderr
    assert "Traceback" not in stopped.stderr
    kept = lines(fresh / "runs/run/round-1/samples.part-0.jsonl")
    assert 8 <= len(kept) < NUM_QUESTIONS
    with stub_process(tmp_path) as new:
        again = align(fresh, "sample", *on("sample", new))
    assert again.returncode == 0, again.stderr
    assert (fresh / "runs/run/round-1/samples.jsonl").read_bytes() == uninterrupted


def served(folder, server, stage, *settings):
    """The configuration with a stage on a server."""
    return load_config(
        folder / "align.yaml",
        [f"{stage}.servers=[{{url: '{server.url}', model: policy}}]", "server.backoff_s=0.02", *settings],
    )


@pytest.fixture
def refusing():
    """A server that refuses whatever names question 2 or 5."""

    def refuse(body, count):
        named = any(f"What is {number}?" in question_text(body) for number in (2, 5))
        return Reply({"error": {"message": "the image is too large"}}, 400) if named else None

    server = StubServer(behave=refuse)
    yield server
    server.stop()


def test_what_a_server_refuses_is_left_out_of_the_samples_and_counted(fresh, refusing):
    config = served(fresh, refusing, "sample", "sample.questions_per_round=8")
    result = run_stage(config, "sample", 1)
    assert [line["id"] for line in samples_of(fresh)] == ["q0", "q1", "q3", "q4", "q6", "q7"]
    assert result.counts["questions"] == 6
    assert result.counts["left_out"] == {"a server refused it": 2}
    left_out = lines(fresh / "runs/run/round-1/samples.left-out.jsonl")
    assert [line["id"] for line in left_out] == ["q2", "q5"]
    assert left_out[0]["message"] == "question q2: 400: the image is too large"
    assert run_stage(config, "score", 1).counts["questions"] == 6
    # The same questions, once the server takes them.
    refusing.behave = None
    assert run_stage(config, "sample", 1, redo=True).counts["questions"] == 8


def test_what_a_server_refuses_is_left_out_of_an_evaluation_and_counted(fresh, refusing):
    write_lines(fresh / "eval.jsonl", lines(fresh / "questions.jsonl")[:7])
    config = served(fresh, refusing, "evaluate", "questions=null", "pairs_file=pairs.jsonl", "rounds=1")
    result = run_stage(config, "evaluate", 0)
    assert result.counts["questions"] == 5
    assert result.counts["left_out"] == {"a server refused it": 2}
    found = lines(fresh / "runs/run/round-0/evaluation.jsonl")
    assert [line["id"] for line in found] == ["q0", "q1", "q3", "q4", "q6"]


@pytest.fixture
def judging():
    """A server that samples as the stub does, and as a critic always finds the longer response better."""

    def answer(body):
        text = question_text(body)
        if is_probe(body) or "The first response" not in text:
            return completion([f"{index} " * (index + 1) for index in range(body.get("n", 1))])
        first, second = (text.split(f"The {which} response: [")[1].split("]")[0] for which in ("first", "second"))
        return completion([f"{'First' if len(first) > len(second) else 'Second'}, it is longer."])

    server = StubServer(answer=answer, key=KEY)
    yield server
    server.stop()


def test_sampling_judging_and_evaluation_on_servers_with_a_key(fresh, judging):
    write_lines(fresh / "questions.jsonl", lines(fresh / "questions.jsonl")[:5])
    keys = {"STUB_KEY": KEY}
    servers = f"[{{url: '{judging.url}', model: policy, api_key_env: STUB_KEY}}]"
    critic = ["--set", "critic.kind=pairwise", "--set", "critic.prompt=pairwise_short"]
    outputs = []
    for stage, *more in (["sample"], ["score", *critic], ["evaluate", "--round", "0"]):
        section = {"sample": "sample", "score": "critic", "evaluate": "evaluate"}[stage]
        result = align(fresh, stage, *more, "--set", f"{section}.servers={servers}", env=keys)
        assert result.returncode == 0, result.stderr
        outputs += [result.stdout, result.stderr]
    scores = lines(fresh / "runs/run/round-1/scores.jsonl")
    assert [line["rewards"] for line in scores] == [[-4.0, 0.0, 4.0]] * 5
    pairs = lines(fresh / "runs/run/round-1/pairs.jsonl")
    assert [pair["responses"] for pair in pairs] == [{"chosen": 2, "rejected": 0}] * 5
    manifest = (fresh / "runs/run/round-1/manifest.json").read_text()
    stages = json.loads(manifest)["stages"]
    assert stages["score"]["inputs"]["critic"] == "served: policy"
    assert "verdicts read from text, without log-probabilities" in stages["score"]["notes"]
    assert (fresh / "runs/run/round-0/evaluation.json").exists()
    written = b"".join(path.read_bytes() for path in (fresh / "runs").rglob("*") if path.is_file())
    assert KEY.encode() not in written
    assert KEY not in "".join(outputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "sample.servers=[{url: 'http://127.0.0.1:9', model: policy}]"], "no server answers"),
        (["--set", "sample.servers=[{url: 'URL', model: other}]"], "serves 'first', 'second', not 'other'"),
        (["--set", "sample.servers=['URL']"], "serves 'first', 'second', not '"),
        (["--set", "sample.servers=[{url: 'URL', api_key_env: NO_SUCH_KEY}]"], "NO_SUCH_KEY is empty or not set"),
        (["--set", "sample.servers=[{url: 'URL', modell: policy}]"], "sample.servers.0.modell: unknown key"),
        (["--set", "sample.servers=['127.0.0.1:8000']"], "must begin with http"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_server_gives_one_clear_message_before_anything_is_sampled(fresh, arguments, message):
    server = StubServer(models=("first", "second"))
    result = align(fresh, "sample", *(argument.replace("URL", server.url) for argument in arguments))
    server.stop()
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert server.num_requests == 0
