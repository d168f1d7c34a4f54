"""A bench in; whether every way to train that works here gives the losses of one process, out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from align import accelerator
from align.config import LaunchSettings, dump_config
from align.distributed.launch import launch_command, run_processes
from align.dpo.sharding.strategies import check_strategy
from align.dpo.step_memory import STRATEGIES
from align.dpo.train import run_dpo
from align.errors import UserError
from align.selftest.bench import Bench, largest_difference, losses_of
from align.selftest.report import Finding, LeftOut, Wrong

# Between losses: of float32 summed in another order, after steps of 1e-3; and of bfloat16 arithmetic (1.5e-2 measured).
FLOAT32_ALLOWED, BFLOAT16_ALLOWED = 2e-4, 5e-2
WORKER = "align.selftest.worker"


def train_alone(bench: Bench) -> Finding:
    """One process: from ln 2 on, shared rows as separate rows, and bfloat16 arithmetic near to float32."""
    batch = {"per_device_train_batch_size": bench.num_processes}
    ways: dict[str, dict[str, Any]] = {
        "shared": {"dpo": batch, "shared_prefix": "on"},
        "separate": {"dpo": batch, "shared_prefix": "off"},
    }
    if accelerator.has_bfloat16(bench.device):
        ways["bfloat16"] = {"dpo": batch | {"bf16": True}}
    losses = {}
    for name, fields in ways.items():
        config = bench.training(f"alone-{name}", **fields)
        run_dpo(config, 1)
        losses[name] = losses_of(config)
    first = abs(losses["shared"][0] - math.log(2))
    differences = {name: largest_difference(losses["shared"], found) for name, found in losses.items()}
    numbers = {"losses": losses, "first_loss_from_ln_2": first, "differences": differences}
    allowed = {name: BFLOAT16_ALLOWED if name == "bfloat16" else FLOAT32_ALLOWED for name in differences}
    text = ", ".join(f"{name} {value:.1e}" for name, value in differences.items() if name != "shared")
    if first > FLOAT32_ALLOWED:
        raise Wrong(f"the first loss is {losses['shared'][0]:.5f}, not ln 2", **numbers)
    if any(not value <= allowed[name] for name, value in differences.items()):
        raise Wrong(f"losses differ from those of shared rows: {text}", **numbers)
    return Finding(f"first loss ln 2; largest difference of losses from shared rows: {text}", numbers)


def train_together(bench: Bench) -> Finding:
    """All processes: what they add up is right, and every strategy has the losses of one process."""
    if bench.device.type != "cpu" and bench.num_processes == 1:
        raise LeftOut("one GPU: there is nothing to exchange and nothing to shard")
    usable, without = {}, {}
    for strategy in STRATEGIES:
        try:
            check_strategy(strategy, bench.device)
            usable[strategy] = bench.training(strategy, strategy=strategy)
        except UserError as error:
            without[strategy] = error.message
    alone = bench.training("alone", dpo={"per_device_train_batch_size": bench.num_processes})
    run_dpo(alone, 1)
    paths = {}
    for strategy, config in usable.items():
        paths[strategy] = bench.folder / f"{strategy}.yaml"
        paths[strategy].write_text(dump_config(config), encoding="utf-8")
    exchanged = _launch(bench, list(paths.values()))
    expected = losses_of(alone)
    differences = {}
    for strategy, config in usable.items():
        try:
            differences[strategy] = largest_difference(expected, losses_of(config))
        except OSError:
            failed = sorted(bench.folder.glob(f"{strategy}.failed-*"))
            reason = failed[0].read_text(encoding="utf-8").strip().splitlines()[-1] if failed else "it did not finish"
            without[strategy], differences[strategy] = reason, math.inf
    numbers = {"exchange": exchanged, "losses": expected, "differences": differences, "left_out": without}
    said = [f"{name} {value:.1e}" for name, value in differences.items()]
    said += [f"{name} left out: {why}" for name, why in without.items() if name not in differences]
    said += [f"{name}: {without[name]}" for name, value in differences.items() if value == math.inf]
    if exchanged.get("wrong", 1):
        raise Wrong("processes add up their tensors wrongly, or not at all", **numbers)
    if any(not value <= FLOAT32_ALLOWED for value in differences.values()):
        raise Wrong(f"losses differ from those of one process: {'; '.join(said)}", **numbers)
    link = f"{bench.num_processes} processes, {exchanged['link_gbs']:.3g} GB/s each"
    return Finding(f"{link}; largest difference of losses from one process: {'; '.join(said)}", numbers)


def _launch(bench: Bench, configs: list[Path]) -> dict[str, float]:
    exchanged = bench.folder / "exchanged.json"
    launch = LaunchSettings(num_processes=bench.num_processes)
    command = launch_command(launch, [str(exchanged), *map(str, configs)])
    command[command.index("align")] = WORKER
    run_processes(command)
    return json.loads(exchanged.read_text(encoding="utf-8")) if exchanged.is_file() else {}
