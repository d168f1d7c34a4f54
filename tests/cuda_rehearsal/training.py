"""Steps of the real trainer on the simulated device, for a tiny model of every family or a
Valley-Eagle of full size."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import TrainerCallback

from align.config import Config
from align.dpo.collator import PairCollator, pair_dataset
from align.dpo.settings import training_arguments, training_fields
from align.dpo.sharding.strategies import check_distribution, strategy_fields
from align.dpo.tokenize import tokenize_pairs
from align.dpo.trainer import PairTrainer
from align.media.images import ImageStore
from align.models.load import load_model, load_processor
from align.models.modules import freeze_parts, part_names
from align.records import Pair
from scripts.valley_size import build_valley
from tests import tiny_models, tiny_vlms
from tests.cuda_rehearsal.simulation import CUDA, Simulation, simulated
from tests.test_family_rounds import COMPANIONS, GOLDENS, SETTINGS

FAMILIES = (*SETTINGS, *tiny_vlms.VLMS)


def build(family: str, folder: Path) -> tuple[Any, Any]:
    """A tiny model of a family in the folder, on the CPU, and its processor."""
    if family not in SETTINGS:
        tiny_vlms.save(family, folder / "policy")
    else:
        (folder / "policy").mkdir()
        for path in (GOLDENS / family).iterdir():
            if path.suffix in COMPANIONS and path.name != "cases.json":
                shutil.copyfile(path, folder / "policy" / path.name)
    model = load_model(folder / "policy", attn_implementation="sdpa")
    return model, load_processor(folder / "policy", **SETTINGS.get(family, {}))


def make_pairs(folder: Path, count: int, *, width: int, height: int, words: int) -> list[Pair]:
    """Pairs about one image each, with responses of `words` words."""
    tiny_models.random_image(0, width, height).save(folder / "image.png")
    question = "Describe the picture in detail, and say what is unusual about it."
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    return [
        Pair(
            id=f"p{number}",
            images=["image.png"],
            prompt=prompt,
            chosen=[{"role": "assistant", "content": "cat " * words}],
            rejected=[{"role": "assistant", "content": "dog " * words}],
        )
        for number in range(count)
    ]


class FrozenOutputs:
    """Which frozen modules give outputs that require gradients although nothing that goes in does: class names."""

    def __init__(self, model: nn.Module) -> None:
        self.found: set[str] = set()
        parts = part_names(model)
        frozen = {
            name.rsplit(".", 1)[0]
            for name, parameter in model.named_parameters()
            if parts[name] == "vision" and not parameter.requires_grad
        }
        for name, module in model.named_modules():
            if name in frozen:
                module.register_forward_hook(self._look)

    def _look(self, module: nn.Module, _: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, torch.Tensor) and output.requires_grad:
            self.found.add(type(module).__name__)


@contextmanager
def processes(count: int) -> Iterator[None]:
    """Within the context this is the first of so many processes; what the others would send is made up."""
    if count == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
    os.environ |= {name: str(value) for name, value in variables.items()}
    torch.distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        for name in variables:
            del os.environ[name]
        AcceleratorState._reset_state(reset_partial_state=True)


class RecordingTrainer(PairTrainer):
    """Notes the types of the log-probabilities that the loss is computed from."""

    output_dtypes: frozenset[str] = frozenset()

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        def forward(**given: Any) -> Any:
            output = model(**given)
            self.output_dtypes |= {str(output.log_probs.dtype)}
            return output

        return super()._compute_loss(forward, inputs, return_outputs)


class Steps(TrainerCallback):
    """Counts the last step alone."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.measured: dict[str, Any] = {}
        self.peak_before_optimizer = 0
        self.trained = self.optimised = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        gc.collect()
        self.simulation.reset()

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, optimizer: Any, **__: Any) -> None:
        self.peak_before_optimizer = self.simulation.memory.peak
        given = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.optimised = sum(p.numel() for p in given)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        memory = self.simulation.memory
        self.measured = {
            "peak": memory.peak,
            "peak_before_optimizer": self.peak_before_optimizer,
            "trained": self.trained,
            "optimised": self.optimised,
            "holders": memory.holders.most_common(12),
            "flops": dict(self.simulation.flops),
            "operations": self.simulation.operations,
            "waits": dict(self.simulation.log.waits),
            "attention": [[*key, count] for key, count in self.simulation.log.attention.items()],
            "shapes": [[*key, count] for key, count in self.simulation.log.shapes.items()],
        }


def train(
    family: str,
    *,
    layout: str = "shared",
    checkpointing: bool = True,
    lora: bool = False,
    live: bool = False,
    steps: int = 2,
    accumulation: int = 1,
    dtype: str = "float32",
    words: int = 20,
    width: int = 60,
    height: int = 50,
    freeze: tuple[str, ...] = ("vision",),
    strategy: str = "ddp",
    num_processes: int = 1,
    layers: int | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """The last of some steps of DPO, and what it took in the first of `num_processes`."""
    folder = Path(tempfile.mkdtemp(prefix="rehearsal-"))
    try:
        # What is compiled on a GPU (an optimiser of 8 bits) runs operation by operation here.
        with processes(num_processes), torch.compiler.set_stance("force_eager"), simulated() as simulation:
            if family.startswith("valley-eagle"):
                model, processor = build_valley(family, "cuda", getattr(torch, dtype), layers)
                reference = build_valley(family, "cuda", getattr(torch, dtype), layers)[0] if live else None
            else:
                model, processor = build(family, folder)
                reference = load_model(folder / "policy", attn_implementation="sdpa").to(CUDA) if live else None
                model = model.to(CUDA)
            if not lora:
                freeze_parts(model, freeze)
            given = make_pairs(folder, num_processes * steps * accumulation, width=width, height=height, words=words)
            settings = {
                "gradient_accumulation_steps": accumulation,
                "gradient_checkpointing": checkpointing,
                "max_steps": steps,
                "dataloader_pin_memory": False,
                "dataloader_num_workers": 0,
                "save_strategy": "no",
                **fields,
            }
            config = Config(
                policy=str(folder), questions=str(folder / "questions.jsonl"), name="rehearsal", dpo=settings
            )
            fields = training_fields(config, folder / "round-1" / "trainer", CUDA, getattr(torch, dtype))
            images = ImageStore(folder)
            pairs = tokenize_pairs(given, processor, images).pairs
            collator = PairCollator(processor, images, layout, always_images=True)
            trainer = RecordingTrainer(
                model,
                args=training_arguments(strategy_fields(strategy, model) | fields),
                train_dataset=pair_dataset(pairs, None if live else [(-100.0, -120.0)] * len(pairs)),
                data_collator=collator,
                processor=processor,
                ref_model=reference,
                peft_config=_adapter() if lora else None,
            )
            frozen = FrozenOutputs(trainer.model)
            check_distribution(strategy, trainer.accelerator.distributed_type)
            counted = Steps(simulation)
            trainer.add_callback(counted)
            row = collator.collate(pairs[:1])
            tokens = [int(row[name].sum()) for name in ("attention_mask", "completion_mask")]
            trainer.train()
            found = {
                "frozen_with_gradients": sorted(frozen.found),
                "output_dtypes": sorted(trainer.output_dtypes),
                "row_tokens": tokens[0],
                "response_tokens": tokens[1],
            }
            return counted.measured | found | {"vocabulary": model.config.get_text_config().vocab_size}
    finally:
        shutil.rmtree(folder)


def _adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, target_modules=["q_proj", "v_proj"], exclude_modules=".*(vision|visual).*")
