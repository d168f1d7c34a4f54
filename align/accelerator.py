"""The device that torch computes on beside the CPU, whatever make it is: torch's accelerator interface,
a few questions wide.

Kinds are `cuda` (NVIDIA, and AMD under ROCm), `xpu` (Intel), `npu` (Ascend, with torch_npu) and `mps` (Apple). torch is
imported in the functions, or only looked up where a thread may ask while it is being imported.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: What `model.device` may name, each with an index or without.
KINDS = ("cpu", "cuda", "mps", "xpu", "npu")
# Processes that share their work need collectives, which these have not.
ALONE = ("mps",)


def kind() -> str:
    """The kind of accelerator that is there and works, else `cpu`."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None else "cpu"


def count() -> int:
    """How many accelerators this process can see."""
    import torch

    return torch.accelerator.device_count() if kind() != "cpu" else 0


def in_use() -> Any | None:
    """torch's module of the accelerator (`torch.cuda`, ...) once this process has begun to use it, else None."""
    torch = sys.modules.get("torch")
    for name in KINDS[1:]:
        module = getattr(torch, name, None)
        if getattr(module, "is_initialized", bool)():
            return module
    # Apple's has no such state, but what it holds for this process is counted.
    mps: Any = getattr(torch, "mps", None)
    if getattr(mps, "is_available", bool)() and mps.driver_allocated_memory():
        return mps
    return None


def name_in_use() -> str:
    """`cuda (its name)` once this process has begun to use an accelerator, which it then holds, else `cpu`."""
    module = in_use()
    if module is None:
        return "cpu"
    name = name_of(module)
    return f"{name} ({module.get_device_name()})" if hasattr(module, "get_device_name") else name


def name_of(module: Any) -> str:
    """The kind of accelerator that a module of torch is for.

    >>> import torch
    >>> name_of(torch.cuda)
    'cuda'
    """
    return module.__name__.rpartition(".")[2]


def empty_cache() -> None:
    """Give memory that nothing uses back to the device; does nothing on a CPU."""
    module = in_use()
    if module is not None:
        module.empty_cache()


def free_memory(device: torch.device) -> int | None:
    """Bytes of the device that a tensor could still take, torch's own cache included; None where torch cannot say."""
    import torch

    if device.type in ("cpu", *ALONE):
        return None
    free, _ = torch.accelerator.get_memory_info(device)
    return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is what one computes in on this device: not on a CPU,
    nor where torch does not say that it can."""
    import torch

    if device.type == "cpu":
        return False
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return supported is not None and supported()


def avoid_cudnn_attention() -> None:
    """Leave attention to the flash and memory-efficient kernels.

    cuDNN, which torch asks first on a Hopper GPU, builds a graph for every new length, and each batch and each step of
    decoding has one. What is called here needs it nowhere: the prompt's call has no mask, and the branches' queries
    stand as many to a head as there are keys.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
