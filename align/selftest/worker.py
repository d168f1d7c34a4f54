"""Trains round 1 of several configurations in every process of a launch, after one exchange between all of them.

    python -m align.selftest.worker EXCHANGED.json CONFIG.yaml ...   (under `accelerate launch`)

A training that fails says so in a file beside its configuration and ends the launch, since the others wait for it.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from pathlib import Path

import torch
from accelerate import PartialState

from align.config import load_config
from align.distributed.ranks import rank, world_size
from align.dpo.train import run_dpo
from align.selftest.measure import wait_for

# Of a tensor that all processes add up: large enough for a link's bandwidth to count and not its delay.
GPU_BYTES, CPU_BYTES = 2**28, 2**22
REPEATS = 5


def exchange(state: PartialState) -> dict[str, float]:
    """Add up a tensor of all processes: whether the sum is right, and bytes that each sent per second, in GB.

    A ring sends 2 (N - 1) / N of the tensor from each process.
    """
    count = (GPU_BYTES if state.device.type != "cpu" else CPU_BYTES) // 4
    given = torch.full((count,), float(rank() + 1), device=state.device)
    torch.distributed.all_reduce(given)
    expected = world_size() * (world_size() + 1) / 2
    wrong = int((given != expected).sum())
    wait_for(state.device)
    start = time.perf_counter()
    for _ in range(REPEATS):
        torch.distributed.all_reduce(given)
    wait_for(state.device)
    sent = REPEATS * 2 * (world_size() - 1) / world_size() * given.nbytes
    return {"wrong": wrong, "link_gbs": sent / (time.perf_counter() - start) / 1e9, "processes": world_size()}


def main(exchanged: Path, configs: list[Path]) -> None:
    """Exchange, then train; what was found lies in `exchanged`, what failed beside its configuration."""
    state = PartialState(cpu=load_config(configs[0]).model.device == "cpu")
    found = exchange(state)
    if rank() == 0:
        exchanged.write_text(json.dumps(found), encoding="utf-8")
    for path in configs:
        try:
            run_dpo(load_config(path), 1)
        except BaseException:
            path.with_suffix(f".failed-{rank()}").write_text(traceback.format_exc(), encoding="utf-8")
            raise
        gc.collect()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]])
