"""A process without a GPU in, one whose torch believes in an H100 of 80 GiB out.

`compile_guard` needs a C++ compiler and torch's headers; `load` must run before the first `import torch`, so this file
imports nothing of it at the top. What can be seen with it: shapes, dtypes, devices, memory, operations. What cannot:
kernels, numerics, NCCL, streams, Triton.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
TOTAL_BYTES = 80 * 2**30
NAME = "rehearsed H100"


def compiler() -> str | None:
    """A C++ compiler on this machine, or None."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "c++"))), None)


def torch_folder() -> Path:
    """Where torch lies, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def compile_guard() -> Path:
    """The compiled guard; made once for each version of the source and of torch."""
    torch = torch_folder()
    key = hashlib.sha256(SOURCE.read_bytes() + str(torch.stat().st_mtime_ns).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"align-fake-cuda-{os.getuid()}-{key}.so"
    if not library.exists():
        found = compiler()
        assert found is not None, "no C++ compiler"
        unfinished = library.with_suffix(f".{os.getpid()}")
        include = [f"-I{torch / 'include' / part}" for part in ("", "torch/csrc/api/include")]
        subprocess.run(
            [found, "-shared", "-fPIC", "-O1", "-w", "-std=c++20", *include, str(SOURCE), "-o", str(unfinished)],
            check=True,
        )
        unfinished.replace(library)
    return library


def load(guard: Path) -> None:
    """Let the next `import torch` find the guard, and answer `torch.cuda` as one H100 would."""
    assert "torch" not in sys.modules, "torch asks for its hooks once: load the guard first"
    libraries = torch_folder() / "lib"
    for name in (*sorted(path.name for path in libraries.glob("libgomp*")), "libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(guard), mode=ctypes.RTLD_GLOBAL)
    _answer_as_an_h100()


class Stream:
    """In place of CUDA's streams and events: everything has happened already."""

    def __init__(self, *_: object, **__: object) -> None:
        self.device = "cuda:0"

    def wait_stream(self, *_: object) -> None: ...

    def wait_event(self, *_: object) -> None: ...

    def record_event(self, *_: object) -> Stream:
        return Stream()

    def record(self, *_: object) -> None: ...

    def wait(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, *_: object) -> float:
        return 0.0


def _answer_as_an_h100() -> None:
    import torch
    import torch._subclasses.fake_tensor as fake_tensor

    properties = types.SimpleNamespace(
        name=NAME,
        major=9,
        minor=0,
        total_memory=TOTAL_BYTES,
        multi_processor_count=132,
        warp_size=32,
        gcnArchName="",
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=232448,
        L2_cache_size=50 * 2**20,
    )
    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "get_device_name": NAME,
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "mem_get_info": (TOTAL_BYTES, TOTAL_BYTES),
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
        "reset_peak_memory_stats": None,
        "memory_stats": {},
        "manual_seed": None,
        "manual_seed_all": None,
        "get_rng_state_all": [],
        "set_rng_state": None,
        "set_rng_state_all": None,
        "_lazy_init": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    memory = {"get_memory_info": (TOTAL_BYTES, TOTAL_BYTES), "memory_reserved": 0, "memory_allocated": 0}
    for name, answer in memory.items():
        setattr(torch.accelerator, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.Stream = torch.cuda.Event = Stream  # type: ignore[misc,assignment]
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *_: Stream()  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda *_: contextlib.nullcontext()  # type: ignore[misc,assignment]
    # DeepSpeed marks ranges for a profiler, and notes which stream still reads what it frees.
    for name in ("range_push", "range_pop"):
        setattr(torch.cuda.nvtx, name, lambda *_: None)
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]
    torch.cuda.get_rng_state = lambda *_: torch.empty(0, dtype=torch.uint8)
    fake_tensor.init_gpu_context = lambda *_, **__: None
    fake_tensor.FakeTensorMode.avoid_device_init = property(lambda _: True)  # type: ignore[method-assign]
