"""A model with half-precision weights in, the same model computing in float32 out: its rounding set aside for a check.

Each module's own weights are cast while it runs and cast back afterwards, which loses nothing; so no second copy of the
model is needed, only that of its widest module. Left out: weights in four bits, whose kernels compute as they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


def computes_in(model: nn.Module) -> torch.dtype:
    """The dtype of the model's arithmetic: autocast's where it is on, else that of its weights."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    kind = parameter.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype


def can_compute_in_float32(model: nn.Module) -> bool:
    """False where the weights are not all there, but gathered from other processes by hooks of their own (ZeRO-3)."""
    return not any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes in float32: without autocast, every module on float32 weights."""
    with ExitStack() as stack:
        for module in model.modules():
            # With its children, whose weights some modules use without calling them (torch's fused attention).
            owns = next(module.parameters(recurse=False), None) is not None
            if owns and any(p.dtype in HALF for p in module.parameters()):
                caster = _Caster(module)
                before = module.register_forward_pre_hook(caster.widen, with_kwargs=True, prepend=True)
                after = module.register_forward_hook(caster.narrow, always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
        device = next(model.parameters()).device.type
        stack.enter_context(torch.autocast(device, enabled=False))
        yield


class _Caster:
    """The hooks of one module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.stored: list[tuple[nn.Parameter, Tensor]] = []

    def widen(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        for parameter in self.module.parameters():
            if parameter.dtype in HALF:
                self.stored.append((parameter, parameter.data))
                parameter.data = parameter.data.float()
        return tuple(map(_wide, args)), {name: _wide(value) for name, value in kwargs.items()}

    def narrow(self, *_: Any) -> None:
        for parameter, data in self.stored:
            parameter.data = data
        self.stored = []


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value
