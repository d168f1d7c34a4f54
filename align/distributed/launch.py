"""The same command again in several processes, under `accelerate launch`; and what schedulers have arranged,
understood.

Processes that a launcher has started already (torchrun, accelerate, Slurm's srun with a task a GPU) are respected: a
command that finds WORLD_SIZE set never starts itself again. Run as a module this file is `accelerate launch` with the
exit code of the process that failed in place of a traceback of the launcher's.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import yaml

from align.config import CONFIG_NAME, Config, LaunchSettings, dump_config
from align.distributed.ports import free_port
from align.distributed.ranks import EXIT_RESTART
from align.distributed.worker_errors import (
    FOLDER,
    OUR_FAULT,
    USERS_FAULT,
    WorkerError,
    killed_by,
    read_worker_errors,
    root_causes,
    write,
)
from align.errors import UserError
from align.log import log

# Seconds that processes have to finish a step and save it, once they were asked to stop.
SAVE_TIMEOUT_S = 300


def wants_processes(config: Config) -> bool:
    """True where the configuration asks for several processes and no launcher has started them yet."""
    launch = config.launch
    several = launch.num_processes * launch.num_machines > 1 or launch.accelerate_config is not None
    return several and "WORLD_SIZE" not in os.environ


def is_started_by_align() -> bool:
    """True in a process that `run_stage_command` started, and that it speaks for."""
    return FOLDER in os.environ


def run_stage_command(
    config: Config, stage: str, number: int, *, only_once: Sequence[str] = (), arguments: Sequence[str] = ()
) -> None:
    """Run `align STAGE --round N` in the processes that `launch:` asks for and wait for them.

    They read this very configuration from a file of their own, whatever it was made from; `arguments` follow, and
    `only_once` (`--redo`) where they are not restarted.
    SIGTERM is passed on to them, so that they can finish a step and save it. Under `num_machines` the same command must
    be run on every machine, with the machine's own rank.

    Raises:
        UserError: what one of them found the user can fix; each such fault once, however many have it.
        SystemExit: with 0 where the processes were asked to stop; with 1 where one failed otherwise,
            after its traceback.
    """
    ended = Ended(EXIT_RESTART)
    with tempfile.TemporaryDirectory(prefix="align-") as folder:
        path = Path(folder) / CONFIG_NAME
        path.write_text(dump_config(config), encoding="utf-8")
        command = [stage, "--round", str(number), "--config", str(path), *arguments]
        while ended.code == EXIT_RESTART and not ended.stopped:
            ended = run_processes(launch_command(config.launch, [*command, *only_once]))
            # Restarted it must resume, not be discarded again.
            only_once = ()
    if ended.stopped:
        log.info("stopped; the same command resumes from here")
        raise SystemExit(0)
    if ended.code:
        raise_collected(ended, f"`align {stage} --round {number}`")


@dataclass(frozen=True)
class Ended:
    """How a launch ended: its exit code, whether it was asked to stop, and the faults that should be said."""

    code: int
    stopped: bool = False
    faults: list[WorkerError] = field(default_factory=list)


def run_processes(command: list[str]) -> Ended:
    """Run a command line of `launch_command` to its end; its processes leave their faults to this one."""
    with tempfile.TemporaryDirectory(prefix="align-") as folder:
        process = subprocess.Popen(command, env=_environment(folder))
        with _passing_on_sigterm(process) as stop:
            code = process.wait()
        return Ended(code, stop.requested, root_causes(read_worker_errors(Path(folder))))


def raise_collected(ended: Ended, name: str) -> NoReturn:
    """Say what the processes of a launch died of, once: as a UserError, or a traceback and exit code 1."""
    ours = [fault for fault in ended.faults if fault.kind != "users"]
    for fault in ours:
        log.error("%s", fault.message)
    if ours or not ended.faults:
        log.error("%s failed in one of its processes%s", name, "" if ours else f" (exit code {ended.code})")
    users = "\n".join(fault.message for fault in ended.faults if fault.kind == "users")
    if users:
        raise UserError(users)
    raise SystemExit(USERS_FAULT if ended.code == USERS_FAULT else OUR_FAULT)


def launch_command(launch: LaunchSettings, arguments: list[str]) -> list[str]:
    """The `accelerate launch` command line of a stage.

    With `launch.accelerate_config` everything comes from that file, but for what is set here as well.
    """
    flags: list[str] = []
    if launch.accelerate_config is not None:
        if not launch.accelerate_config.is_file():
            raise UserError("no such accelerate configuration", where=str(launch.accelerate_config))
        _check_yaml(launch.accelerate_config)
        flags += ["--config_file", str(launch.accelerate_config)]
        if launch.num_processes > 1:
            flags += ["--num_processes", str(launch.num_processes * launch.num_machines)]
    else:
        flags += ["--num_processes", str(launch.num_processes * launch.num_machines)]
        flags += ["--num_machines", str(launch.num_machines), "--dynamo_backend", "no", "--mixed_precision", "no"]
        # Asked for as multi-GPU also without one: a MULTI_CPU setting would silently run one process.
        flags.append("--multi_gpu")
    if launch.num_machines > 1:
        if launch.main_process_ip is None:
            raise UserError(
                f"launch.num_machines is {launch.num_machines}, but launch.main_process_ip is empty",
                fix="give the address of the machine with machine_rank 0, the same on every machine",
            )
        flags += ["--machine_rank", str(launch.machine_rank), "--main_process_ip", launch.main_process_ip]
        flags += ["--main_process_port", str(launch.main_process_port or 29500)]
    else:
        flags += ["--main_process_port", str(launch.main_process_port or free_port())]
    return [sys.executable, "-m", "align.distributed.launch", *flags, "--module", "align", *arguments]


def adopt_slurm() -> None:
    """Give a task of `srun` the variables of its rank, as torchrun would; does nothing elsewhere.

    A step with a task a process (`--ntasks-per-node=8`) needs no launcher. A step with one task a machine is left to
    `launch.num_processes`; the batch script itself is no step.
    """
    step = os.environ.get("SLURM_STEP_NUM_TASKS")
    if step is None or "WORLD_SIZE" in os.environ or int(step) == 1:
        return
    if step == os.environ.get("SLURM_STEP_NUM_NODES", "1"):
        return
    os.environ |= {
        "WORLD_SIZE": step,
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": str(_local_rank(int(os.environ["SLURM_LOCALID"]))),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or os.environ["SLURM_LAUNCH_NODE_IPADDR"],
        # A port of the job's own, the same in all of its tasks.
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000),
    }


def _local_rank(task: int) -> int:
    """Of a task on its machine: the number of the GPU that it uses,
    which `--gpus-per-task=1` shows to it as its first."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return task % len(visible.split(",")) if visible else task


@dataclass
class _Stop:
    requested: bool = field(default=False)


@contextmanager
def _passing_on_sigterm(process: subprocess.Popen[bytes]) -> Iterator[_Stop]:
    """Within the context SIGTERM goes to the processes that work, not to their launcher, which would soon kill them."""
    import psutil

    stop = _Stop()

    def pass_on(*_: object) -> None:
        stop.requested = True
        # Whoever has ended by itself meanwhile need not be told.
        with suppress(psutil.NoSuchProcess):
            for worker in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if worker.ppid() == process.pid:
                        worker.terminate()

    if threading.current_thread() is not threading.main_thread():
        # Python hands signals to the main thread only; whoever waits there deals with them.
        yield stop
        return
    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _environment(faults: str) -> dict[str, str]:
    # For a scheduler that signals every process: the launcher then waits so long before it kills.
    return os.environ | {FOLDER: faults, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVE_TIMEOUT_S)}


def _accelerate_launch(arguments: list[str]) -> None:
    """`accelerate launch ARGUMENTS`, quietly; ends with the exit code of the process that failed."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # What went wrong has been said by the process itself.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        for rank, failure in error.failures.items():
            if failure.exitcode < 0:
                _leave_for(rank, -failure.exitcode)
        # Others fail because one has gone; what that one says counts.
        sys.exit(next((code for code in (EXIT_RESTART, USERS_FAULT) if code in codes), OUR_FAULT))
    except SignalException as error:
        sys.exit(128 + error.sigval)


def _leave_for(rank: int, number: int) -> None:
    """Say for a process that a signal has ended what it could not say itself."""
    folder = os.environ.get(FOLDER)
    if folder is not None and all(fault.rank != rank for fault in read_worker_errors(Path(folder))):
        write(killed_by(number, rank), Path(folder))


if __name__ == "__main__":
    _accelerate_launch(sys.argv[1:])


def _check_yaml(path: Path) -> None:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"not valid YAML: {error}", where=str(path), fix="write it with `accelerate config`") from None
    if not isinstance(found, dict):
        raise UserError(
            f"expected keys and values, found {type(found).__name__}",
            where=str(path),
            fix="write it with `accelerate config`",
        )
