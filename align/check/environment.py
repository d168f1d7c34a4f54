"""This machine and this environment in, the text of `align env` out: what somebody needs who is to reproduce a fault.

Left out on purpose: variables of the environment, names, paths and addresses: a bug report is public.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from typing import get_args

import align
from align import accelerator
from align.config import LaunchSettings
from align.errors import UserError
from align.monitoring.format import size
from align.versions import Installed, required

# Not in our requirements, or in those of extras, and yet what a fault may come from.
ALSO = ("vllm", "bitsandbytes", "flash-attn", "torchvision", "torch-npu", "triton", "huggingface-hub", "tokenizers")
_FOLDERS = re.compile(r"""(?:[A-Za-z]:)?[/\\][^\s'"(),;]*[/\\]""")


def environment() -> str:
    """Versions, devices, strategies of training and missing extras, one fact per line; what is broken is one, too."""
    parts = {
        "system": _system,
        "packages": _packages,
        "devices": _devices,
        "strategies of training": _strategies,
        "extras": _extras,
    }
    lines = []
    for name, part in parts.items():
        try:
            for line in part():
                lines.append(line)
        except Exception as error:  # a package that is damaged fails as it likes where it is imported
            lines.append(f"{name}: unknown ({_said(error)})")
    return "\n".join(lines)


def _said(error: Exception) -> str:
    """The error's kind and first line, without the folders of paths.

    >>> _said(ImportError("cannot import name 'x' from 'torch' (/home/me/torch/__init__.py)\\nand more"))
    "ImportError: cannot import name 'x' from 'torch' (__init__.py)"
    """
    text = _FOLDERS.sub("", (str(error).splitlines() or [""])[0])
    return f"{type(error).__name__}: {text[:200]}"


def _system() -> Iterator[str]:
    yield f"valley-align {align.__version__}"
    yield f"Python {platform.python_version()}, {platform.system()} {platform.release()}, {platform.machine()}"
    import psutil

    yield f"{os.cpu_count()} cores, {size(psutil.virtual_memory().total)} of memory"


def _packages() -> Iterator[str]:
    yield "packages:"
    for each in sorted(required(), key=lambda each: each.requirement.name):
        if each.extra:
            continue
        verdict = "" if each.supported else f"  NOT SUPPORTED, wants {each.requirement.specifier}"
        yield f"  {each.requirement.name} {each.version or 'is missing'}{verdict}"
    for each in required(ALSO):
        if each.version is not None:
            yield f"  {each.requirement.name} {each.version}"


def _devices() -> Iterator[str]:
    import torch

    kind = accelerator.kind()
    if kind == "cpu":
        yield "devices: cpu only"
        return
    made_for = torch.version.cuda or torch.version.hip
    yield f"devices: {accelerator.count()} x {kind}" + (f", torch built for {made_for}" if made_for else "")
    module = torch.get_device_module(kind)
    for index in range(accelerator.count()):
        name = module.get_device_name(index) if hasattr(module, "get_device_name") else kind
        memory = f", {size(torch.accelerator.get_memory_info(index)[1])}" if kind not in accelerator.ALONE else ""
        yield f"  {kind}:{index} {name}{memory}"


def _strategies() -> Iterator[str]:
    import torch

    from align.dpo.sharding.strategies import check_strategy

    yield "strategies of training:"
    for strategy in get_args(LaunchSettings.model_fields["strategy"].annotation):
        try:
            check_strategy(strategy, torch.device(accelerator.kind()))
            yield f"  {strategy}: available"
        except UserError as error:
            yield f"  {strategy}: {error.message}"


def _extras() -> Iterator[str]:
    lacking: dict[str, list[Installed]] = {}
    for each in required():
        if each.extra and not each.supported:
            lacking.setdefault(each.extra, []).append(each)
    yield "extras that lack something:" if lacking else "extras: all installed"
    for extra, missing in sorted(lacking.items()):
        wants = (each.asked + (f" (found {each.version})" if each.version else "") for each in missing)
        yield f"  {extra}: {', '.join(wants)}"
