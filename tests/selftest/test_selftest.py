"""`align selftest` on a CPU: each check by itself, what is kept when it is stopped, and what `align plan` makes of it."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from align.config import load_config
from align.dpo.train import run_dpo
from align.errors import UserError
from align.plan.make import make_plan
from align.plan.measured import Measured, keep, machine_file, machine_of, measured_here, read_measured
from align.plan.speed import BANDWIDTH_GBS, TFLOPS
from align.plan.text import plan_text
from align.selftest.bench import largest_difference, losses_of
from align.selftest.checks import Selftest
from align.selftest.measure import measure
from align.selftest.report import Finding, LeftOut, Wrong, run_checks, summary
from tests.stage_runs import make_project

H200 = Measured("H200", "cuda", "2026-11-28", 1, 139.8, 640.0, 4100.0, 3900.0, 210.0, 0.0)


@pytest.fixture(scope="module")
def selftest(tmp_path_factory):
    return Selftest(tmp_path_factory.mktemp("selftest"), torch.device("cpu"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["versions", "kernels", "equivalence", "sampling", "scoring", "training"])
def test_a_check_passes_on_a_cpu(selftest, tmp_path, name):
    outcomes = run_checks(selftest.checks([name]), tmp_path / "out.json", lambda _: None)
    assert [outcome.verdict for outcome in outcomes] == ["passed"], outcomes[0].text + outcomes[0].traceback
    assert json.loads((tmp_path / "out.json").read_text())["complete"]


def test_losses_of_another_training_are_not_equal(selftest):
    config = selftest.bench.training("faster", dpo={"per_device_train_batch_size": 2, "learning_rate": 2e-3})
    usual = selftest.bench.training("usual", dpo={"per_device_train_batch_size": 2})
    for each in (config, usual):
        run_dpo(each, 1)
    assert largest_difference(losses_of(config), losses_of(usual)) > 2e-4
    assert largest_difference([math.nan], [0.5]) == math.inf


def test_what_is_not_there_is_left_out_with_the_reason(selftest, tmp_path):
    (outcome,) = run_checks(selftest.checks(["vllm"]), tmp_path / "out.json", lambda _: None)
    assert outcome.verdict == "left out"
    assert outcome.text in ("vLLM is not installed", "no GPU is there for vLLM")
    with pytest.raises(UserError, match="did you mean kernels"):
        selftest.checks(["kernel"])


def test_what_a_check_and_its_processes_print_is_kept_off_the_screen_and_in_the_json_where_it_failed(tmp_path, capfd):
    def loud():
        print("said here")
        subprocess.run([sys.executable, "-c", "import os; os.write(2, b'said elsewhere')"], check=True)

    def good():
        loud()
        return Finding("fine")

    def wrong():
        loud()
        raise Wrong("it is not")

    out = tmp_path / "out.json"
    good_one, wrong_one = run_checks({"good": good, "wrong": wrong}, out, lambda outcome: print(outcome.line()))
    assert good_one.output == ""
    assert "said here" in wrong_one.output
    assert "said elsewhere" in wrong_one.output
    assert (tmp_path / "out-output.log").read_text().count("said elsewhere") == 2
    shown = capfd.readouterr()
    assert "said" not in shown.out + shown.err
    assert "fine" in shown.out


def stopped():
    raise KeyboardInterrupt


def test_what_was_found_is_kept_when_it_is_stopped_and_nothing_that_raises_ends_it(tmp_path):
    def left_out():
        raise LeftOut("no such thing")

    def wrong():
        raise Wrong("two and two are five", sum=5)

    checks = {
        "good": lambda: Finding("fine", {"machine": {"name": "x"}}),
        "left": left_out,
        "wrong": wrong,
        "broken": lambda: 1 / 0,
        "stopped": stopped,
        "never": left_out,
    }
    out, seen = tmp_path / "new" / "out.json", []
    with pytest.raises(KeyboardInterrupt):
        run_checks(checks, out, seen.append)
    found = json.loads(out.read_text())
    assert not found["complete"]
    assert found["machine"] == {"name": "x"}
    assert [check["verdict"] for check in found["checks"]] == ["passed", "left out", "failed", "failed"]
    assert found["checks"][2]["numbers"] == {"sum": 5}
    assert "ZeroDivisionError" in found["checks"][3]["traceback"]
    assert summary(seen) == "1 passed, 2 failed, 1 left out"


def test_a_plan_counts_with_what_was_measured_here_and_says_so(tmp_path):
    folder = make_project(tmp_path)
    assert measured_here() is None
    keep(H200, machine_file())
    assert measured_here() == H200
    machine = machine_of(measured_here(), 1, layer_us=5.0)
    assert (machine.gpu_gib, machine.tflops, machine.layer_us) == (139.8, 640.0, 5.0)
    text = plan_text(make_plan(load_config(folder / "align.yaml"), machine, response_tokens=8))
    assert "measured on H200, 2026-11-28" in " ".join(text.split())


def test_a_cpu_is_planned_with_only_where_its_measurements_are_named(selftest, tmp_path):
    measured = measure(torch.device("cpu"), selftest.bench.policy.get_decoder(), repeats=1)
    keep(measured, machine_file())
    assert measured_here() is None
    named = machine_of(read_measured(machine_file()), 1)
    assert named.waits
    assert min(named.tflops, named.bandwidth_gbs, named.arrays_gbs, named.layer_us, named.gpu_gib) > 0
    assumed = machine_of(None, 4)
    assert (assumed.tflops, assumed.bandwidth_gbs, assumed.measured_on) == (TFLOPS, BANDWIDTH_GBS, "")
    with pytest.raises(UserError, match="no measurements can be read"):
        read_measured(tmp_path / "nothing.json")
