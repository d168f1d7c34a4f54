"""Command lines of launches, what schedulers set, and which strategy holds."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch

from align.config import LaunchSettings, build_config
from align.distributed.launch import adopt_slurm, launch_command, wants_processes
from align.dpo.sharding.strategies import (
    FROM_ACCELERATE,
    check_distribution,
    chosen_strategy,
    decoder_layer_names,
    process_group_backend,
    strategy_fields,
    unsharded_models,
)
from align.errors import UserError
from tests import tiny_models, tiny_vlms
from tests.doc_pages import ROOT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher around the tests."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "ACCELERATE_", "MASTER_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)


def config_with(**launch):
    return build_config({"policy": "p", "questions": "q.jsonl", "launch": launch}, base=Path("/data"))


def flags(command: list[str]) -> dict[str, str]:
    ours = command[: command.index("--module")]
    return {name: ours[i + 1] for i, name in enumerate(ours[:-1]) if name.startswith("--")}


def test_one_machine_gets_a_free_port_and_the_stage():
    command = launch_command(LaunchSettings(num_processes=8), ["dpo", "--round", "2"])
    assert flags(command)["--num_processes"] == "8"
    assert flags(command)["--num_machines"] == "1"
    assert int(flags(command)["--main_process_port"]) > 1023
    assert "--multi_gpu" in command
    assert command[command.index("--module") :] == ["--module", "align", "dpo", "--round", "2"]


def test_several_machines_count_all_processes_and_need_an_address():
    with pytest.raises(UserError, match=r"num_machines is 4, but launch\.main_process_ip is empty"):
        launch_command(LaunchSettings(num_processes=8, num_machines=4), [])
    launch = LaunchSettings(num_processes=8, num_machines=4, machine_rank=3, main_process_ip="10.0.0.1")
    found = flags(launch_command(launch, []))
    assert (found["--num_processes"], found["--machine_rank"]) == ("32", "3")
    assert (found["--main_process_ip"], found["--main_process_port"]) == ("10.0.0.1", "29500")


def test_an_accelerate_configuration_decides_instead(tmp_path):
    with pytest.raises(UserError, match="no such accelerate configuration"):
        launch_command(LaunchSettings(accelerate_config=tmp_path / "nowhere.yaml"), [])
    path = tmp_path / "accelerate.yaml"
    path.write_text("num_processes: 4\n")
    command = launch_command(LaunchSettings(accelerate_config=path), ["dpo"])
    assert flags(command)["--config_file"] == str(path)
    assert "--num_processes" not in command
    assert "--multi_gpu" not in command
    assert config_with(accelerate_config="accelerate.yaml").launch.accelerate_config == Path("/data/accelerate.yaml")
    assert wants_processes(config_with(accelerate_config="accelerate.yaml"))


def test_processes_that_a_launcher_has_started_start_no_others(monkeypatch):
    assert not wants_processes(config_with())
    assert wants_processes(config_with(num_processes=2))
    assert wants_processes(config_with(num_machines=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not wants_processes(config_with(num_processes=2))


def set_slurm(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def test_tasks_of_srun_know_their_rank(monkeypatch):
    step = {"STEP_NUM_TASKS": "16", "STEP_NUM_NODES": "2", "PROCID": "11", "LOCALID": "3"}
    set_slurm(monkeypatch, **step, LAUNCH_NODE_IPADDR="10.0.0.1", JOB_ID="70123")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    adopt_slurm()
    found = [os.environ[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")]
    assert found == ["16", "11", "3", "10.0.0.1", "30123"]
    assert not wants_processes(config_with(num_processes=8))


@pytest.mark.parametrize(("visible", "expected"), [("0", "0"), ("4,5,6,7,0,1,2,3", "3"), ("", "3")])
def test_a_task_that_sees_one_gpu_takes_that(monkeypatch, visible, expected):
    step = {"STEP_NUM_TASKS": "8", "STEP_NUM_NODES": "2", "PROCID": "7", "LOCALID": "3"}
    set_slurm(monkeypatch, **step, LAUNCH_NODE_IPADDR="10.0.0.1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    adopt_slurm()
    assert os.environ["LOCAL_RANK"] == expected


def test_fsdp2_joins_processes_by_a_backend_for_gpus_and_cpus():
    gpu = torch.device("cuda", 0)
    assert process_group_backend("fsdp2", gpu) == "cuda:nccl,cpu:gloo"
    assert process_group_backend("zero3", gpu) is None
    assert process_group_backend("fsdp2", CPU) is None


@pytest.mark.parametrize(
    "step",
    [
        {"NTASKS": "16", "PROCID": "0"},  # the batch script itself
        {"STEP_NUM_TASKS": "1", "STEP_NUM_NODES": "1", "PROCID": "0"},  # srun of a single task
        {"STEP_NUM_TASKS": "4", "STEP_NUM_NODES": "4", "PROCID": "2"},  # a task a machine, which starts its processes
    ],
)
def test_other_slurm_jobs_are_left_to_the_configuration(monkeypatch, step):
    set_slurm(monkeypatch, **step)
    adopt_slurm()
    assert "WORLD_SIZE" not in os.environ
    assert wants_processes(config_with(num_processes=8))


def test_fsdp2_without_an_accelerator_is_refused_and_one_process_needs_no_strategy(monkeypatch):
    config = config_with(num_processes=2, strategy="fsdp2")
    assert chosen_strategy(config, CPU) == "ddp"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="on a CPU it would silently train as ddp"):
        chosen_strategy(config, CPU)
    assert chosen_strategy(config, torch.device("cuda", 0)) == "fsdp2"


def test_accelerates_own_configuration_goes_first_and_models_before_training_are_whole(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert chosen_strategy(config_with(num_processes=2, strategy="zero2"), CPU) == FROM_ACCELERATE
    with unsharded_models():
        assert "ACCELERATE_USE_DEEPSPEED" not in os.environ
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"


@pytest.mark.parametrize(("strategy", "found"), [("fsdp2", "MULTI_CPU"), ("fsdp2", "MULTI_GPU"), ("zero3", "FSDP")])
def test_another_kind_of_training_than_asked_for_is_noticed(strategy, found):
    with pytest.raises(UserError, match=f"launch.strategy is {strategy}, but accelerate trains as {found}"):
        check_distribution(strategy, found)
    check_distribution("ddp", "MULTI_GPU")
    check_distribution("zero3", "DEEPSPEED")
    check_distribution("fsdp2", "FSDP")


@pytest.mark.parametrize(
    ("name", "layer"),
    [("qwen2_5_vl", "Qwen2_5_VLDecoderLayer"), ("gemma3", "Gemma3DecoderLayer"), ("internvl", "Qwen2DecoderLayer")],
)
def test_the_layers_that_fsdp2_gathers_are_those_of_the_language_model(name, layer):
    model, _ = tiny_vlms.VLMS[name]()
    assert decoder_layer_names(model) == [layer]


def test_fsdp2_names_the_layers_and_deepspeed_takes_the_rest_from_the_trainer():
    model = tiny_models.llava_onevision()
    fsdp = strategy_fields("fsdp2", model)["fsdp_config"]
    assert fsdp["transformer_layer_cls_to_wrap"] == ["Qwen2DecoderLayer"]
    assert fsdp["version"] == 2
    zero = strategy_fields("zero3", model)["deepspeed"]
    assert zero["zero_optimization"]["stage"] == 3
    assert zero["bf16"] == {"enabled": "auto"}
    assert strategy_fields("ddp", model) == {}


@pytest.mark.parametrize(("seconds_left", "num_steps"), [(None, 13), (3600, 13), (200, 1)])
def test_a_slurm_job_whose_time_is_up_begins_no_further_step(tmp_path, seconds_left, num_steps):
    log = tmp_path / "log"
    for name, text in {"scontrol": "echo localhost", "srun": f"echo >> {log}"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "localhost"}
    if seconds_left is not None:
        variables["SLURM_JOB_END_TIME"] = str(int(time.time()) + seconds_left)
    subprocess.run(["bash", "scripts/slurm.sbatch", "align.yaml"], cwd=ROOT, env=variables, check=True)
    assert len(log.read_text().splitlines()) == num_steps
