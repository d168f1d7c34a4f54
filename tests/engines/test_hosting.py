"""Whether vLLM answers for a stage, and on which GPUs; without vLLM, which another suite starts (tests/vllm)."""

import pytest

from align.check.preflight import run_preflight
from align.config import VllmSettings, load_config
from align.engines.vllm import command, hosting
from align.errors import UserError
from tests.models import tiny_valley
from tests.stage_runs import make_project
from tests.tiny_models import save_llava_onevision


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return str(tiny_valley.folder(folder / "ours")), str(save_llava_onevision(folder / "theirs"))


def surroundings(monkeypatch, *, version, device, gpus=("0",)):
    monkeypatch.setattr(hosting, "vllm_version", lambda: version)
    monkeypatch.setattr(hosting, "is_cpu_build", lambda: False)
    monkeypatch.setattr(hosting.accelerator, "kind", lambda: device)
    monkeypatch.setattr(hosting, "visible_gpus", lambda: list(gpus))


def test_auto_takes_vllm_where_it_is_installed_knows_the_family_and_has_a_gpu(folders, monkeypatch):
    ours, theirs = folders
    settings = VllmSettings()
    surroundings(monkeypatch, version="0.33", device="cuda")
    use, why = hosting.choose("auto", ours, settings)
    assert use
    assert "0.33" in why
    assert hosting.choose("auto", theirs, settings)[0] is False
    assert hosting.choose("vllm", theirs, settings)[0] is True
    assert hosting.choose("local", ours, settings)[0] is False
    assert hosting.choose("auto", ours, VllmSettings(tensor_parallel_size=2))[0] is False
    surroundings(monkeypatch, version="0.33", device="cpu")
    assert hosting.choose("auto", ours, settings) == (False, "local: no GPU is there for vLLM")
    surroundings(monkeypatch, version=None, device="cuda")
    assert hosting.choose("auto", ours, settings) == (False, "local: vLLM is not installed")


def test_vllm_that_is_asked_for_and_missing_is_an_error(folders, monkeypatch):
    surroundings(monkeypatch, version=None, device="cuda")
    with pytest.raises(UserError, match="vLLM is not installed here"):
        hosting.choose("vllm", folders[0], VllmSettings())


def test_more_gpus_than_a_process_has_are_refused():
    with pytest.raises(UserError, match="2 replicas of 2 GPUs need 4, this process has 3"):
        hosting.gpu_groups(["0", "1", "2"], 2, 2)
    with pytest.raises(UserError, match="1 replicas of 4 GPUs need 4, this process has 1"):
        hosting.gpu_groups(["0"], 4, None)


def test_a_process_of_several_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(hosting.accelerator, "kind", lambda: "cuda")
    for name, value in (("CUDA_VISIBLE_DEVICES", "4,5,6"), ("LOCAL_WORLD_SIZE", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert hosting.visible_gpus() == ["5"]
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert hosting.visible_gpus() == ["4", "5", "6"]


def test_a_family_whose_responses_end_with_text_is_refused(tmp_path):
    from tests.models.goldens import VALLEY1

    served = command.Served(str(VALLEY1.folder), "policy", "float32", {}, 20)
    with pytest.raises(UserError, match="end with '###'"):
        command.serve_arguments(served, VllmSettings(), tmp_path)


def test_the_end_of_a_turn_ends_responses_of_360vl(tmp_path):
    from align.models.load import load_model, load_processor
    from tests.models.goldens import VL360

    ends = command.end_tokens(str(VL360.folder), load_processor(VL360.folder))
    assert set(ends) == set(load_model(VL360.folder).generation_config.eos_token_id)
    assert len(ends) > 1


def test_vllm_that_computes_on_gpus_needs_one(folders, monkeypatch):
    surroundings(monkeypatch, version="0.33", device="cpu", gpus=())
    with pytest.raises(UserError, match=r"vLLM 0\.33 computes on GPUs, and none is visible"):
        hosting.choose("vllm", folders[0], VllmSettings())
    monkeypatch.setattr(hosting, "is_cpu_build", lambda: True)
    assert hosting.choose("vllm", folders[0], VllmSettings())[0] is True


def test_processes_of_a_launch_write_logs_of_their_own(folders, monkeypatch, tmp_path):
    made = []

    class Recorded:
        def __init__(self, launches, *, logs, **settings):
            made.append(logs.name)

        __enter__ = stop = lambda self: None

    monkeypatch.setattr(hosting, "Replicas", Recorded)
    served = command.Served(folders[0], "policy", "float32", {}, 20)
    hosting.host(served, VllmSettings(), tmp_path / "sample")
    hosting.release()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    hosting.host(served, VllmSettings(), tmp_path / "sample")
    hosting.release()
    assert made == ["sample", "sample-process-1"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    critic = {"kind": "pairwise", "model": "./critic", "engine": "vllm"}
    return make_project(tmp_path_factory.mktemp("project"), critic=critic)


def problems(folder, *settings):
    return {
        problem.area: problem.text for problem in run_preflight(load_config(folder / "align.yaml", settings)).problems
    }


def test_a_check_says_what_is_missing_for_vllm_before_anything_is_sampled(project, monkeypatch):
    wanted = ["sample.engine=vllm", "evaluate.engine=vllm", "model.device=cpu"]
    surroundings(monkeypatch, version=None, device="cpu", gpus=())
    (missing,) = problems(project, *wanted).values()
    assert "vLLM is not installed here" in missing
    surroundings(monkeypatch, version="0.33", device="cpu", gpus=())
    (no_gpu,) = problems(project, *wanted).values()
    assert "none is visible here" in no_gpu
    surroundings(monkeypatch, version="0.33", device="cuda")
    monkeypatch.setattr(hosting, "vllm_architectures", lambda: ["Qwen2ForCausalLM"])
    unknown = problems(project, *wanted)
    assert set(unknown) == {"sample.engine", "critic.engine"}
    assert "vLLM does not know the architecture LlavaOnevisionForConditionalGeneration" in unknown["critic.engine"]
    monkeypatch.setattr(hosting, "vllm_architectures", lambda: ["LlavaOnevisionForConditionalGeneration"])
    assert problems(project, *wanted) == {}


def test_a_check_says_what_will_answer(project, monkeypatch):
    surroundings(monkeypatch, version=None, device="cpu", gpus=())
    facts = run_preflight(load_config(project / "align.yaml", ["critic.engine=local"])).facts
    assert "sample.engine: local: vLLM is not installed" in facts
    assert "critic.engine: local, as the configuration says" in facts
