"""A call of scaled_dot_product_attention in, the kernel that a Hopper GPU would run it with out, and its memory.

The rules are torch's (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp), read and not run. cuDNN is asked first
where `torch.backends.cuda` allows it, as it is by default on a Hopper GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def kernel_of(query: Tensor, key: Tensor, mask: Tensor | None, *, causal: bool, grouped: bool) -> str:
    """`cudnn`, `flash`, `efficient` or `math`, which makes a tensor of queries times keys."""
    allowed = _cur_sdpa_kernel_backends()
    half = query.dtype in (torch.bfloat16, torch.float16)
    width, same_heads = query.shape[-1], query.shape[1] == key.shape[1]
    if SDPBackend.CUDNN_ATTENTION in allowed and half and width <= 128 and width % 8 == 0 and key.shape[2] != 1:
        return "cudnn"
    if SDPBackend.FLASH_ATTENTION in allowed and mask is None and half and width <= 256 and width % 8 == 0:
        return "flash"
    if SDPBackend.EFFICIENT_ATTENTION in allowed and same_heads and width % (8 if half else 4) == 0:
        return "efficient"
    assert SDPBackend.MATH in allowed or not grouped, "no kernel takes this call"
    return "math"


def run_kernel(
    kernel: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, given: dict[str, Any]
) -> Tensor:
    """The tensors that the kernel makes and keeps, and its operations."""
    causal, scale = bool(given.get("is_causal")), given.get("scale")
    groups = query.shape[1] // key.shape[1]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, float("-inf"))
    if kernel == "math":
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if causal:
            mask = torch.zeros(query.shape[2], key.shape[2], dtype=query.dtype, device=query.device)
        scores = query @ key.transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
        return (scores if mask is None else scores + mask).softmax(-1) @ value
    if mask is None and kernel != "efficient":
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)[0]
    if groups > 1:
        # cuDNN reads grouped keys as they are; here only shapes matter.
        key = key[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)
        value = value[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)
    if mask is not None:
        # Rows of the mask must begin at a multiple of sixteen bytes: torch pads it.
        missing = -mask.shape[-1] % 16
        mask = torch.nn.functional.pad(mask, (0, missing))[..., : mask.shape[-1]] if missing else mask
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    keeps = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, keeps, 0.0, causal, scale=scale
    )[0]


@contextmanager
def attention_as_on_cuda(simulation: Any) -> Iterator[None]:
    """Within the context attention on the device goes the way of a Hopper GPU, and is noted in `simulation.log`."""
    from tests.cuda_rehearsal.simulation import place

    original = torch.nn.functional.scaled_dot_product_attention

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        given = {**dict(zip(NAMES, args, strict=False)), **kwargs}
        query, key, value, mask = (given.get(name) for name in NAMES[:4])
        assert query is not None
        assert key is not None
        assert value is not None
        if not isinstance(query, FakeTensor):
            return original(*args, **kwargs)
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
        causal, grouped = bool(given.get("is_causal")), bool(given.get("enable_gqa"))
        kernel = kernel_of(query, key, mask, causal=causal, grouped=grouped)
        simulation.log.attention[
            kernel, tuple(query.shape), tuple(key.shape), mask is not None, query.requires_grad, place()
        ] += 1
        with torch.autocast("cuda", enabled=False):
            return run_kernel(kernel, query, key, value, mask, given)

    # Every module that has taken the function by its name.
    modules = [
        module for module in list(sys.modules.values()) if vars(module).get("scaled_dot_product_attention") is original
    ]
    for module in modules:
        module.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        for module in modules:
            module.scaled_dot_product_attention = original
