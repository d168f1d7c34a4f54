"""What is installed and what torch computes on: said in full by `align env`,
refused in one line where it cannot work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import align
from align import accelerator, versions
from align.check.environment import environment
from align.errors import UserError
from align.models.device import pick_device, pick_dtype

ROOT = Path(__file__).parent.parent
RANGES = ["torch>=2.11", "trl<1.17,>=1.16", "nowhere-to-be-found>=1", "gradio>=99; extra == 'web'"]


def run_align(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [variables.pop("PYTHONPATH", ""), str(ROOT)]))
    return subprocess.run(
        [sys.executable, "-m", "align", *words],
        env=os.environ | {"PYTHONPATH": path} | variables,
        capture_output=True,
        text=True,
    )


def install_fake(folder: Path, name: str, version: str) -> None:
    """Metadata, as pip writes it, of a package that stands before the real one on the path."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_version_out_of_range_and_a_missing_package_are_named_in_one_line(tmp_path, monkeypatch):
    install_fake(tmp_path, "trl", "1.17.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError) as refused:
        versions.require_supported(RANGES)
    assert str(refused.value) == (
        "not supported: trl 1.17.0, nowhere-to-be-found (not installed); "
        "python -m pip install 'trl<1.17,>=1.16' 'nowhere-to-be-found>=1'"
    )


def test_extras_are_no_reason_to_refuse():
    versions.require_supported(["gradio>=99; extra == 'web'", "torch>=2.11"])
    assert [each.extra for each in versions.required(RANGES)] == ["", "", "", "web"]


def test_an_unsupported_version_ends_a_command_and_an_import_with_one_line(tmp_path):
    install_fake(tmp_path, "trl", "0.1.0")
    checkpoint = ROOT / "align" / "demo" / "policy"
    command = run_align("info", str(checkpoint), PYTHONPATH=str(tmp_path))
    assert command.returncode == 2
    assert command.stderr.startswith("error: not supported: trl 0.1.0; python -m pip install 'trl")
    assert command.stderr.count("\n") == 1
    code = "import align; import align.models"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    imported = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert imported.stderr.splitlines()[-1].startswith("align.errors.UserError: not supported: trl 0.1.0;")


def test_env_says_what_is_unsupported_instead_of_failing(tmp_path):
    install_fake(tmp_path, "trl", "0.1.0")
    found = run_align("env", PYTHONPATH=str(tmp_path))
    assert found.returncode == 0, found.stderr
    assert "trl 0.1.0  NOT SUPPORTED, wants " in found.stdout


def test_env_tells_what_is_broken_from_the_rest_and_no_folder(tmp_path):
    for package in ("torch", "psutil"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('/home/someone/lib/libx.so is broken')")
    found = run_align("env", PYTHONPATH=str(tmp_path))
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(f"valley-align {align.__version__}\nPython ")
    for part in ("system", "devices", "strategies of training"):
        assert f"\n{part}: unknown (RuntimeError: libx.so is broken)\n" in found.stdout
    assert "\npackages:\n" in found.stdout
    assert "\nextras" in found.stdout


def test_env_names_versions_devices_and_strategies_and_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    text = environment()
    assert f"valley-align {align.__version__}" in text
    # As pip knows it: a build for CUDA may say more about itself.
    assert f"  torch {metadata.version('torch')}\n" in text
    assert "\ndevices: " in text
    assert "\n  ddp: available\n" in text
    assert "abcdefghij" not in text
    assert "0123456789abcdef" not in text
    assert str(Path.home()) not in text
    assert str(ROOT) not in text


def test_version_is_that_of_the_package_everywhere():
    assert run_align("--version").stdout == f"valley-align {align.__version__}\n"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == align.__version__
    assert f"\nversion: {align.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {align.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_a_shell_completes_commands_and_options():
    words = {"COMP_WORDS": "align sco", "COMP_CWORD": "1", "_ALIGN_COMPLETE": "complete_bash"}
    code = "import sys; sys.argv[0] = 'align'; from align.cli import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | words, capture_output=True, text=True
    )
    assert found.stdout.split() == ["score"]
    words |= {"COMP_WORDS": "align score --re", "COMP_CWORD": "2"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | words, capture_output=True, text=True
    )
    assert "--redo" in found.stdout.split()


@pytest.mark.parametrize("setting", ["tpu", "cuda0", "gpu:1", "cpu:x"])
def test_a_device_that_does_not_exist_is_refused_with_those_that_do(setting):
    with pytest.raises(UserError, match=r"model.device"):
        pick_device(setting)


@pytest.mark.parametrize("kind", [kind for kind in accelerator.KINDS if kind not in ("cpu", accelerator.kind())])
def test_an_accelerator_that_is_not_there_is_refused(kind):
    with pytest.raises(UserError, match=f"model.device is '{kind}', but torch sees"):
        pick_device(kind)


def test_the_device_is_the_accelerator_where_there_is_one_and_arithmetic_is_what_it_has():
    device = pick_device("auto")
    assert device.type == accelerator.kind()
    assert (device.type == "cpu") == (accelerator.count() == 0)
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert accelerator.free_memory(torch.device("cpu")) is None
    # Asked for by name, bfloat16 is taken on a CPU too.
    assert pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(accelerator.kind() == "cpu", reason="no accelerator is visible")
def test_an_accelerator_in_use_is_named_and_its_memory_counted():
    device = pick_device("auto")
    block = torch.ones(2**20, device=device)
    assert accelerator.name_in_use().startswith(accelerator.kind())
    free = accelerator.free_memory(device)
    assert device.type in accelerator.ALONE or (free is not None and free > block.nbytes)
    del block
    accelerator.empty_cache()


def test_a_number_that_no_accelerator_has_is_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"'cuda:2', but torch sees 2 x cuda; .* a number below 2"):
        pick_device("cuda:2")


def test_an_extra_is_installed_by_what_it_lacks_here():
    texts = ["torch>=2.11; extra == 'lmms-eval'", "filelock<3; extra == 'lmms-eval'", "gradio>=99; extra == 'web'"]
    assert versions.install_extra("lmms-eval", texts) == "python -m pip install 'filelock<3'"


def test_no_page_and_no_message_tells_to_install_a_name_that_is_not_published():
    files = [path for folder in ("align", "reward", "docs") for path in (ROOT / folder).rglob("*.*")]
    found = re.compile(r"pip install [^\n`]*valley-align")
    pages = [path for path in (*files, ROOT / "README.md") if path.suffix in (".py", ".md", ".yaml", ".j2")]
    assert [path.name for path in pages if found.search(path.read_text(encoding="utf-8"))] == []


def test_all_requirements_can_be_read():
    assert {"torch", "trl"} <= {each.requirement.name for each in versions.required() if not each.extra}
    assert Requirement("torch") not in list(versions.required())
