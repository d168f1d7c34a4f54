"""The same command again in several processes, under `accelerate launch`.

An environment that a launcher has already prepared (torchrun, accelerate, Slurm's srun with their variables) is
respected: a command that finds RANK and WORLD_SIZE set never starts itself again.
"""

from __future__ import annotations

import os
import subprocess
import sys

from align.config import Config
from align.errors import UserError


def wants_processes(config: Config) -> bool:
    """True where the configuration asks for several processes and no launcher has started them yet."""
    return config.launch.num_processes > 1 and "WORLD_SIZE" not in os.environ


def run_stage_command(config: Config, stage: str, number: int, config_args: list[str]) -> None:
    """Run `align STAGE --round N` in `launch.num_processes` processes and wait for it.

    Raises:
        UserError: a process failed; its own message stands above this one.
    """
    code = subprocess.call(launch_command(config, [stage, "--round", str(number), *config_args]))
    if code:
        raise UserError(
            f"`align {stage} --round {number}` failed in one of {config.launch.num_processes} processes (exit code {code})",
            fix="see the messages above",
        )


def launch_command(config: Config, arguments: list[str]) -> list[str]:
    """The `accelerate launch` command line of a stage."""
    flags = [
        "--num_processes",
        str(config.launch.num_processes),
        "--num_machines",
        "1",
        "--dynamo_backend",
        "no",
        "--mixed_precision",
        "no",
    ]
    if config.launch.num_processes > 1:
        # Asked for as multi-GPU also without one: a MULTI_CPU setting would silently run one process.
        flags.append("--multi_gpu")
    return [sys.executable, "-m", "accelerate.commands.launch", *flags, "--module", "align.cli", *arguments]
