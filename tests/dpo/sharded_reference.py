"""One of the processes of `test_sharded_reference.py`: reference log-probabilities of a
model that none of them holds whole."""

from __future__ import annotations

import contextlib
import gc
import json
import weakref
from pathlib import Path

import torch
from accelerate import PartialState

from align.dpo.choose_layout import choose_layout
from align.dpo.collator import PairCollator
from align.dpo.reference import reference_log_probs
from align.dpo.sharding.shards import gathered_as_needed, loading_sharded
from align.dpo.sharding.strategies import without_compiled_collectives
from align.media.images import ImageStore
from align.models.load import load_model, load_processor
from align.records import Pair, read_jsonl
from tests.dpo.conftest import KEY, tokenized


def compute_in_pieces(folder: Path, layout: str) -> None:
    without_compiled_collectives("zero3", torch.device("cpu"))
    state = PartialState(cpu=True)
    processor, images = load_processor(str(folder / "policy")), ImageStore(folder)
    pairs = tokenized(read_jsonl(folder / "pairs.jsonl", Pair), processor, images)
    collator = PairCollator(processor, images, layout, always_images=True)
    with loading_sharded(True):
        model = load_model(str(folder / "policy"), device=None)
        shards = [weakref.ref(parameter.ds_tensor) for parameter in model.parameters()]
        held = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
        with gathered_as_needed(model):
            proof = choose_layout("auto", model, PairCollator(collator.processor, collator.images, "shared"), pairs[:2])
        reference_log_probs(
            folder / f"{layout}.safetensors",
            KEY,
            pairs,
            collator=collator,
            load_model=lambda: model,
            autocast=contextlib.nullcontext,
            batch_size=2,
            state=state,
        )
    gc.collect()
    with loading_sharded(True, torch.bfloat16):
        half = load_model(str(folder / "policy"), device=None, dtype=torch.bfloat16)
    dtypes = sorted({str(parameter.dtype) for parameter in half.parameters()})
    found = {"held": held, "proof": proof, "freed": all(piece() is None for piece in shards), "dtypes": dtypes}
    (folder / f"{layout}-{state.process_index}.json").write_text(json.dumps(found))
