"""A device in, what `align plan` counts with out: arithmetic, memory traffic, the start of a layer.

Each is measured as a training or sampling step meets it: the products of a linear layer forward and backward, a product
of few rows that reads its weights, an activation over arrays of a layer's size, a layer that has nothing to compute.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
from torch.nn.functional import silu

from align import accelerator
from align.plan.measured import Measured
from align.plan.speed import GIB

# Rows, inputs and outputs of the linear layer; elements of the weights that few rows read; elements of the arrays. On a
# CPU arrays of a layer lie in its caches, so both a small and a larger one count.
GPU_SIZES = ((8192, 4096, 8192), (8192, 16384), (2**27,))
CPU_SIZES = ((768, 512, 1024), (512, 16384), (2**18, 2**20))
FEW_ROWS = 16


def measure(
    device: torch.device, decoder: Any, *, repeats: int = 30, clock: Callable[[], float] = time.perf_counter
) -> Measured:
    """Measure a device; `decoder` is a tiny language model on it, whose layers have nearly nothing to compute."""
    on_gpu = device.type != "cpu"
    dtype = torch.bfloat16 if accelerator.has_bfloat16(device) else torch.float32
    product, weights, arrays = GPU_SIZES if on_gpu else CPU_SIZES

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def seconds(run: Callable[[], Any]) -> float:
        return _least_seconds(run, device, repeats, clock)

    rows, inputs, outputs = product
    x, w, g = random(rows, inputs), random(outputs, inputs), random(rows, outputs)
    flops = 6 * rows * inputs * outputs / seconds(lambda: (x @ w.t(), g @ w, g.t() @ x))
    few, wide = random(FEW_ROWS, weights[0]), random(weights[1], weights[0])
    read = wide.nbytes / seconds(lambda: few @ wide.t())
    # Read and written by the activation, both read and the product written.
    moved = [5 * y.nbytes / seconds(lambda y=y: silu(y) * y) for y in map(random, arrays)]  # type: ignore[misc]
    ids = torch.ones(1, 4, dtype=torch.int64, device=device)
    with torch.no_grad():
        layer = seconds(lambda: decoder(input_ids=ids, use_cache=True)) / len(decoder.layers)
    return Measured(
        name=_name(device),
        kind=device.type,
        date=date.today().isoformat(),
        gpus=max(1, accelerator.count()),
        gpu_gib=round(_memory(device) / GIB, 1),
        tflops=flops / 1e12,
        bandwidth_gbs=read / 1e9,
        arrays_gbs=statistics.harmonic_mean(moved) / 1e9,
        layer_us=layer * 1e6,
    )


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _least_seconds(run: Callable[[], Any], device: torch.device, repeats: int, clock: Callable[[], float]) -> float:
    """Of one run, the least of some rounds: whatever else the machine does only adds to it."""
    run()
    found = []
    for _ in range(max(repeats // 5, 1)):
        wait_for(device)
        start = clock()
        for _ in range(5):
            run()
        wait_for(device)
        found.append((clock() - start) / 5)
    return min(found)


def _name(device: torch.device) -> str:
    module = torch.get_device_module(device)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type


def _memory(device: torch.device) -> int:
    if device.type == "cpu" or device.type in accelerator.ALONE:
        import psutil

        return int(psutil.virtual_memory().total)
    return torch.accelerator.get_memory_info(device)[1]
