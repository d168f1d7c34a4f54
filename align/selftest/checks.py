"""The checks of a selftest by name, in the order in which they run: quick ones and those that others build on first."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from align import accelerator
from align.check.environment import environment
from align.dpo.collator import PairCollator, layout_of, prompt_inputs_of
from align.dpo.tokenize import tokenize_pairs
from align.engines.base import Engine, SampleResult, SamplingSettings
from align.errors import UserError
from align.models.device import pick_device
from align.plan.measured import Measured, keep, machine_file
from align.prefix.equivalence import check_equivalence
from align.selftest.bench import Bench
from align.selftest.measure import measure
from align.selftest.report import Check, Finding, LeftOut, Wrong
from align.selftest.training import train_alone, train_together

# The two calls of a shared row: the prompt, causal; responses behind it, under a mask. Batch, heads, key heads, tokens
# of the prompt and of the responses, width, as in a 7B model and for a CPU.
GPU_CALLS, CPU_CALLS = (1, 28, 4, 1988, 400, 128), (1, 4, 2, 128, 32, 32)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# Rounding of results near 1: of bfloat16, and of float32.
HALF_ALLOWED, FLOAT32_ALLOWED = 3e-2, 1e-4
NEW_TOKENS, NUM_SAMPLES = 12, 3


class Selftest:
    """All checks on this machine, with a folder for what they write."""

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        self.device = device if device is not None else pick_device("auto")
        gpus = accelerator.count() if self.device.type not in ("cpu", *accelerator.ALONE) else 2
        self.bench = Bench(folder, self.device, 1 if self.device.type in accelerator.ALONE else gpus)
        self.measured: Measured | None = None

    def checks(self, only: Sequence[str] = ()) -> dict[str, Check]:
        """By name; `only` some of them. Raises UserError for a name that is none."""
        found: dict[str, Check] = {
            "versions": self.versions,
            "speed": self.speed,
            "kernels": self.kernels,
            "equivalence": self.equivalence,
            "sampling": self.sampling,
            "scoring": self.scoring,
            "training": partial(train_alone, self.bench),
            "processes": self.processes,
            "vllm": self.vllm,
        }
        for name in only:
            if name not in found:
                near = get_close_matches(name, found, 1)
                raise UserError(
                    f"no check is called {name!r}" + (f" (did you mean {near[0]}?)" if near else ""),
                    fix=f"there are: {', '.join(found)}",
                )
        return {name: check for name, check in found.items() if not only or name in only}

    def versions(self) -> Finding:
        """What is installed and what torch sees, as `align env` says it."""
        lines = environment().splitlines()
        return Finding(f"torch {torch.__version__} on {self.device.type}; `align env` in full", {"environment": lines})

    def speed(self) -> Finding:
        """Arithmetic, memory traffic and the start of a layer, kept for `align plan`."""
        found = self.measured = measure(self.device, self.bench.policy.get_decoder())
        keep(found, machine_file())
        return Finding(
            f"{found.tflops:.3g} TFLOP/s, {found.bandwidth_gbs:.0f} GB/s of weights, {found.arrays_gbs:.0f} GB/s of "
            f"arrays, {found.layer_us:.0f} us per layer: kept for align plan",
            {"machine": asdict(found)},
        )

    def kernels(self) -> Finding:
        """Which attention kernels take the two calls of a shared row, how long each takes, and whether it is right."""
        batch, heads, key_heads, prompt, responses, width = GPU_CALLS if self.device.type != "cpu" else CPU_CALLS
        dtype = torch.bfloat16 if accelerator.has_bfloat16(self.device) else torch.float32
        allowed = HALF_ALLOWED if dtype == torch.bfloat16 else FLOAT32_ALLOWED
        draw = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(batch, count, prompt + responses, width, generator=draw).to(self.device, dtype)
            for count in (heads, key_heads, key_heads)
        )
        sees = torch.ones(responses, prompt + responses, dtype=torch.bool, device=self.device).tril(prompt)
        grouped = {"enable_gqa": True}
        wide = [tensor.repeat_interleave(heads // key_heads, 1) for tensor in (key, value)]
        calls: dict[str, tuple[Any, ...]] = {
            "prompt": (query[:, :, :prompt], key[:, :, :prompt], value[:, :, :prompt], None, grouped),
            "responses": (query[:, :, prompt:], *wide, sees, {}),
        }
        errors: dict[str, dict[str, float]] = {}
        for name, (q, k, v, mask, more) in calls.items():
            run = partial(scaled_dot_product_attention, q, k, v, attn_mask=mask, is_causal=mask is None, **more)
            exact = scaled_dot_product_attention(
                q.float(), k.float(), v.float(), attn_mask=mask, is_causal=mask is None, **more
            )
            errors[name] = {"chosen": float((run().float() - exact).abs().max())}
            for kernel, backend in BACKENDS.items():
                try:
                    with sdpa_kernel(backend):
                        errors[name][kernel] = float((run().float() - exact).abs().max())
                except RuntimeError:
                    continue
        said = "; ".join(f"{name}: {', '.join(list(found)[1:])}" for name, found in errors.items())
        if any(not error <= allowed for found in errors.values() for error in found.values()):
            raise Wrong(f"an attention kernel is wrong by more than {allowed}: {errors}", errors=errors)
        return Finding(f"{said}, all within {allowed:g} of float32", {"errors": errors, "dtype": str(dtype)})

    def equivalence(self) -> Finding:
        """Shared rows against separate ones in bfloat16, within the noise, and wrong rows outside of it."""
        pairs = tokenize_pairs(self.bench.pairs[:2], self.bench.processor, self.bench.images).pairs
        batch = PairCollator(self.bench.processor, self.bench.images, "shared").collate(pairs)
        batch = {name: value.to(self.device) for name, value in batch.items()}
        model = self.bench.model(torch.bfloat16)
        found = check_equivalence(model, prompt_inputs_of(batch), layout_of(batch))
        wrong = {name: asdict(difference) for name, difference in (found.wrong or {}).items()}
        parts = {name: part and asdict(part) for name, part in vars(found).items() if name in ("difference", "allowed")}
        if not found.exact:
            raise Wrong(found.reason, **parts, wrong_rows=wrong)
        return Finding(found.reason, {**parts, "wrong_rows": wrong})

    def sampling(self) -> Finding:
        """Greedy responses behind shared prompts against those to repeated prompts; and how fast they are drawn."""
        greedy = SamplingSettings(temperature=0.0, max_new_tokens=NEW_TOKENS)
        engine, separate = self.bench.engine("on"), self.bench.engine("off")
        ours, theirs = (_sampled(each, self.bench, greedy, 1)[0] for each in (engine, separate))
        drawn = replace(greedy, temperature=1.0)
        results, seconds = _sampled(engine, self.bench, drawn, NUM_SAMPLES)
        rate = sum(sum(result.num_tokens) for result in results.values()) / seconds
        other = [name for name, result in ours.items() if result.texts != theirs[name].texts]
        if other:
            raise Wrong(f"greedy responses differ behind shared prompts: {', '.join(other)}", differing=other)
        return Finding(f"{len(ours)} greedy responses equal; {rate:.0f} tokens per second", {"tokens_per_s": rate})

    def scoring(self) -> Finding:
        """Log-probabilities of answers behind shared prompts against those behind repeated ones."""
        asked = self.bench.comparisons()
        ours, theirs = (np.stack(self.bench.engine(way).log_probs(asked)) for way in ("on", "off"))
        difference = float(np.abs(ours - theirs).max())
        if not difference <= FLOAT32_ALLOWED * max(1.0, float(np.abs(theirs).max())):
            raise Wrong(f"log-probabilities differ by {difference:.1e} behind shared prompts", difference=difference)
        return Finding(
            f"{ours.size} log-probabilities, largest difference {difference:.1e}", {"difference": difference}
        )

    def processes(self) -> Finding:
        """Every strategy in several processes; the link between GPUs is kept with the rest that was measured."""
        if self.device.type in accelerator.ALONE:
            raise LeftOut(f"several processes cannot train on {self.device.type}")
        found = train_together(self.bench)
        if self.measured is not None and self.device.type != "cpu":
            linked = replace(self.measured, link_gbs=found.numbers["exchange"]["link_gbs"])
            keep(linked, machine_file())
            return replace(found, numbers=found.numbers | {"machine": asdict(linked)})
        return found

    def vllm(self) -> Finding:
        """vLLM with the tiny policy: it starts, reads the prompts as we do, and answers."""
        from align.engines.open import open_hosted
        from align.engines.vllm import hosting
        from align.engines.vllm.command import vllm_version

        if vllm_version() is None:
            raise LeftOut("vLLM is not installed")
        if self.device.type == "cpu":
            raise LeftOut("no GPU is there for vLLM")
        config = self.bench.training("vllm")
        try:
            engine, _ = open_hosted(
                config,
                config.policy,
                {},
                engine="vllm",
                open_image=self.bench.images.open,
                logs=self.bench.folder / "v",
            )
            assert engine is not None
            greedy = SamplingSettings(temperature=0.0, max_new_tokens=NEW_TOKENS)
            served = _sampled(engine, self.bench, greedy, 1)[0]
            ours = _sampled(self.bench.engine("on"), self.bench, greedy, 1)[0]
        finally:
            hosting.release()
        equal = sum(served[name].texts == result.texts for name, result in ours.items())
        if equal < math.ceil(len(ours) / 2):
            raise Wrong(f"{equal} of {len(ours)} greedy responses equal ours", equal=equal)
        return Finding(f"vLLM {vllm_version()}: {equal} of {len(ours)} greedy responses equal ours", {"equal": equal})


def _sampled(
    engine: Engine, bench: Bench, settings: SamplingSettings, num_samples: int
) -> tuple[dict[str, SampleResult], float]:
    found: dict[str, SampleResult] = {}
    start = time.perf_counter()
    engine.sample(bench.requests(num_samples), settings, lambda result: found.update({result.id: result}))
    return found, time.perf_counter() - start


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Where checks write; gone when they have ended."""
    return tempfile.TemporaryDirectory(prefix="align-selftest-")
