"""What the pages talk about, made small: checkpoints at path/to/..., questions, public data in their formats,
photos."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from align.demo import write_demo
from tests.data.sources import picture, png, save_pictures, write_json, write_jsonl, write_parquet
from tests.doc_pages import ROOT, blocks_of

GOLDENS = ROOT / "tests" / "golden"
# The demo's policy answers in short sentences and its critic decides; both are a few megabytes.
CHECKPOINTS = {
    "Valley-Eagle-7B": ROOT / "align/demo/policy",
    "llava-critic-7b": ROOT / "align/demo/critic",
    "critic": ROOT / "align/demo/critic",
    "another-critic": ROOT / "align/demo/critic",
    "llava-onevision-qwen2-7b-ov": GOLDENS / "llava_ov_original_tiny",
    "Valley2.5": GOLDENS / "valley25_tiny",
}
NUM_QUESTIONS, NUM_EVAL = 8, 3


def write_world(folder: Path) -> Path:
    """Write everything into an empty folder."""
    for name, source in CHECKPOINTS.items():
        shutil.copytree(source, folder / "path/to" / name, ignore=shutil.ignore_patterns("cases.json", "golden.npz"))
    _write_tower(folder / "path/to/siglip")
    write_demo(folder / "data", num_questions=NUM_QUESTIONS, num_eval=NUM_EVAL, seed=0)
    (folder / "data/align.yaml").unlink()
    shutil.copy(folder / "data/eval.jsonl", folder / "data/heldout.jsonl")
    picture(1).save(folder / "photo.jpg")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    _write_sources(folder)
    _write_titled(folder, ROOT / "docs/migrating.md")
    return folder


def _write_titled(folder: Path, page: Path) -> None:
    """The data and other trainers' configurations that a page shows under a title, and the picture they are about."""
    for block in blocks_of(page):
        if block.title is not None and block.language in ("json", "text"):
            save_pictures((folder / block.title).parent, 1, "kitten.jpg")
            (folder / block.title).write_text(block.text)


def _write_tower(folder: Path) -> None:
    """A tiny random vision encoder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def _write_sources(folder: Path) -> None:
    """Four rows of each data set that the pages convert."""
    save_pictures(folder / "coco/train2017", 4, "{}.jpg")
    save_pictures(folder / "photos", 4)
    save_pictures(folder / "MMPR/images/ScienceQA", 4)
    save_pictures(folder / "eval/images", 1, "{}.png")
    write_jsonl(folder / "eval/questions.jsonl", [{"id": "e0", "question": "What?", "images": ["images/0.png"]}])
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "A disc."), ("human", "Which colour?"), ("gpt", "Red.")]
    conversation = [{"from": speaker, "value": text} for speaker, text in turns]
    write_json(
        folder / "llava_7b_v1_preference.json",
        [{"id": f"l{index}", "image": f"{index}.jpg", "conversations": conversation} for index in range(4)],
    )
    write_jsonl(
        folder / "MMPR/annotations/science.jsonl",
        [
            {"image": f"{index}.png", "question": f"<image>\nWhat is {index}?", "chosen": "A disc.", "rejected": "No."}
            for index in range(4)
        ],
    )
    science = {"root": "images/ScienceQA", "annotation": "annotations/science.jsonl", "repeat_time": 1, "length": 4}
    write_json(folder / "MMPR/meta.json", {"science": science})
    rows = [
        {"ds_name": "RLAIF-V", "idx": str(index), "image": {"bytes": png(index), "path": f"{index}.jpg"}}
        | {"question": f"What is in picture {index}?", "chosen": "A disc.", "rejected": "A dog."}
        for index in range(4)
    ]
    (folder / "openbmb/RLAIF-V-Dataset").mkdir(parents=True)
    write_parquet(folder / "openbmb/RLAIF-V-Dataset/train.parquet", rows)
    lines = [f"What is in photo {index}?,{index}.png" for index in range(4)]
    (folder / "photos.csv").write_text("\n".join(["prompt,file", *lines]) + "\n")


def copy_of(world: Path, folder: Path) -> Path:
    """A fresh copy; the checkpoints, which nothing writes to, are linked."""
    folder.mkdir(parents=True)
    for path in world.iterdir():
        if path.name in ("path", "scripts") or path.is_symlink():
            (folder / path.name).symlink_to(path.resolve())
        elif path.is_dir():
            shutil.copytree(path, folder / path.name, symlinks=True)
        else:
            shutil.copy(path, folder / path.name)
    return folder
