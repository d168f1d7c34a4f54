"""One predicate says what running out of memory is, and no one takes it for something else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from align.engines import shared_path
from align.engines.local import LocalEngine
from align.errors import UserError, is_out_of_memory
from align.prefix import equivalence
from align.prefix.equivalence import check_equivalence
from align.prefix.layout import Layout, Segment
from reward.judge_model import BranchedPrompt
from tests.engines.conftest import collect, question, text_model, text_tokenizer
from tests.engines.test_local_sample import WARM
from tests.prefix.prefix_models import SUPPORTED, make

# As torch 2.13 and the libraries below it write them.
NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"),
    torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("HIP error: out of memory"),
    RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError(
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input."
    ),
    RuntimeError("NCCL error: unhandled cuda error, NCCL version 2.27.5\nLast error:\nCuda failure 2 'out of memory'"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.8 GB, other allocations: 1.2 MB, max allowed: 18.1 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError("Unable to allocate 4.00 TiB for an array with shape (1048576, 1048576) and data type float32"),
]
OTHER = [
    UserError("out of memory", fix="ask for less"),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 1"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    ValueError("this model has no memory tokens"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: str(error)[:40])
def test_what_allocators_say_is_running_out_of_memory(error: BaseException):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHER, ids=lambda error: str(error)[:40])
def test_other_faults_are_not(error: BaseException):
    assert not is_out_of_memory(error)


def test_what_this_torch_and_numpy_really_raise_is_known():
    for allocate in (lambda: torch.empty(2**50), lambda: np.empty(2**50)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", NO_MEMORY[1:7], ids=lambda error: str(error)[:40])
def test_memory_that_ends_in_the_first_batch_says_nothing_about_the_architecture(
    monkeypatch: pytest.MonkeyPatch, error: Exception
):
    requests = [question(i, num_images=0) for i in range(4)]
    expected = collect(LocalEngine(text_model(), text_tokenizer()), requests, WARM)
    original, sizes = shared_path.prefill, []

    def limited(model, inputs, cache, rows):
        sizes.append(len(rows))
        if sizes[-1] > 1:
            raise error
        return original(model, inputs, cache, rows)

    monkeypatch.setattr(shared_path, "prefill", limited)
    engine = LocalEngine(text_model(), text_tokenizer())
    assert collect(engine, requests, WARM) == expected
    assert sizes[0] > 1
    assert engine.fallback_reason is None
    assert "agree" in engine.notes["shared_prefix"]
    assert "halved" in engine.notes["out_of_memory"]


@pytest.mark.parametrize("error", NO_MEMORY[1:7], ids=lambda error: str(error)[:40])
def test_memory_that_ends_in_the_check_of_equivalence_is_raised(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(equivalence, "unshared_segments", fails)
    model, inputs = make(SUPPORTED["qwen2"])
    layout = Layout.build(inputs["attention_mask"], [[Segment([7, 8])]] * len(inputs["input_ids"]), pad_token_id=0)
    with pytest.raises(type(error)):
        check_equivalence(model, inputs, layout)


def test_memory_that_ends_while_judgements_are_checked_halves_the_batch(monkeypatch: pytest.MonkeyPatch):
    prompts = [BranchedPrompt((), None, "Q: ", (("a ", f"{i} "), ("a ", "c ")), "? ", ("y", "no")) for i in range(4)]
    expected = LocalEngine(text_model(), text_tokenizer()).log_probs(prompts)
    original = equivalence.unshared_segments

    def limited(model, inputs, layout, **settings):
        if len(inputs["input_ids"]) > 1:
            raise RuntimeError("HIP error: out of memory")
        return original(model, inputs, layout, **settings)

    monkeypatch.setattr(equivalence, "unshared_segments", limited)
    engine = LocalEngine(text_model(), text_tokenizer())
    found = engine.log_probs(prompts)
    assert engine.fallback_reason is None
    assert all(np.abs(ours - theirs).max() <= 1e-5 for ours, theirs in zip(found, expected, strict=True))
