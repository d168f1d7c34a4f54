"""The families' golden checkpoints, and how the cases recorded from the authors' own code are asked of ours."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from align.models.load import load_model, load_processor
from align.models.open_image import FRAME_KEY

FOLDER = Path(__file__).parents[1] / "golden"
Case = dict[str, Any]


@dataclass(frozen=True)
class Golden:
    """A golden folder. `settings` are those of the processor that a case was recorded under; `ask` gives its
    conversation, images and videos; `recorded_text` a rendered text as the case tells it;
    `greedy` says how the recording went on."""

    name: str
    settings: Callable[[Case], dict[str, Any]]
    ask: Callable[[Case], dict[str, Any]]
    recorded_text: Callable[[str], str]
    greedy: dict[str, Any] = field(default_factory=lambda: {"eos_token_id": -1, "pad_token_id": 0})
    padding_tolerance: float = 1e-4

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @cached_property
    def cases(self) -> dict[str, Case]:
        return {case["name"]: case for case in json.loads((self.folder / "cases.json").read_text())}

    @cached_property
    def arrays(self) -> Any:
        return np.load(self.folder / "golden.npz")

    @cached_property
    def model(self) -> Any:
        return load_model(self.folder)

    def recorded(self, name: str, array: str) -> Any:
        """A recorded array of a case, flat where it had a batch of one; None where there is none."""
        key = f"{name}/{array}"
        return self.arrays[key] if key in self.arrays.files else None

    def processor(self, name: str) -> Any:
        return _processor(self.folder, json.dumps(self.settings(self.cases[name])))

    def batches(self, longest: int) -> list[list[str]]:
        """The cases of at most so many tokens that can be asked together, being recorded under the same settings."""
        grouped: dict[str, list[str]] = {}
        for name, case in self.cases.items():
            if case["seq_len"] <= longest:
                grouped.setdefault(json.dumps([self.settings(case), self._prompt(name)]), []).append(name)
        return [names for names in grouped.values() if len(names) > 1]

    def inputs(self, *names: str, **options: Any) -> Any:
        """Model inputs of one case, or of several as a batch."""
        asked = [self._placed(name) for name in names]
        kinds = {key: [one[key] for one in asked] if len(asked) > 1 else asked[0][key] for key in asked[0]}
        tensors = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding_side": "left"}
        return self.processor(names[0]).apply_chat_template(**kinds, **self._prompt(names[0]), **{**tensors, **options})

    def text(self, name: str) -> str:
        return self.processor(name).apply_chat_template(**self._placed(name), **self._prompt(name))

    def _placed(self, name: str) -> dict[str, Any]:
        return {"videos": [], **self.ask(self.cases[name])}

    def _prompt(self, name: str) -> dict[str, Any]:
        """Whether an answer is wanted: not where the conversation ends with one.
        Valley 1's styles write it themselves."""
        ends_with_answer = self.ask(self.cases[name])["conversation"][-1]["role"] == "assistant"
        return {} if self is VALLEY1 or ends_with_answer else {"add_generation_prompt": True}


@cache
def _processor(folder: Path, settings: str) -> Any:
    return load_processor(folder, **json.loads(settings))


def _as_recorded(golden: str) -> Callable[[Case], dict[str, Any]]:
    def ask(case: Case) -> dict[str, Any]:
        return {"conversation": case["conversation"], "images": [FOLDER / golden / path for path in case["images"]]}

    return ask


def _valley25_settings(case: Case) -> dict[str, Any]:
    limit = case.get("max_pixels", 16384 * 784)
    black = "black" if case["kind"] == "black_image" else "none"
    return {"max_pixels": limit, "max_pixels_of_several": limit, "text_only_image": black}


def _ask_onevision(case: Case) -> dict[str, Any]:
    """A video is recorded as one image of several pictures."""
    is_video = case["kind"] == "video"
    turns = [turn.replace("<image>", "<video>") if is_video else turn for turn in case["turns"]]
    roles = itertools.cycle(["user", "assistant"])
    conversation = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    pictures = [FOLDER / "llava_ov_original_tiny" / path for path in case["images"]]
    placed = {"images": [], "videos": [pictures]} if is_video else {"images": pictures}
    return {"conversation": conversation, **placed}


def _ask_valley1(case: Case) -> dict[str, Any]:
    """The pictures of a video file as the reader of video files gives them."""
    turns = case.get("turns", [["human", case.get("question")]])
    roles = {"human": "user", "gpt": "assistant"}
    conversation = [{"role": "system", "content": case["system"]}]
    conversation += [{"role": roles[who], "content": text} for who, text in turns]
    paths = [case["images"][index] for index in case.get("sampled", range(len(case["images"])))]
    pictures = [Image.open(FOLDER / "valley_v1_tiny" / path) for path in paths]
    for number, picture in enumerate(pictures):
        if case["preprocess"] == "video":
            picture.info[FRAME_KEY] = number
    return {"conversation": conversation, "images": pictures}


VALLEY_EAGLE = Golden(
    "valley_eagle_tiny",
    settings=lambda case: {"max_pixels": 1280 * 28 * 28, "text_only_image": "black"},
    ask=_as_recorded("valley_eagle_tiny"),
    recorded_text=lambda text: text.replace("<image>", ""),
    greedy={"min_new_tokens": 12},
    padding_tolerance=1e-5,
)
VALLEY25 = Golden(
    "valley25_tiny",
    settings=_valley25_settings,
    ask=_as_recorded("valley25_tiny"),
    recorded_text=lambda text: text,
)
ONEVISION = Golden(
    "llava_ov_original_tiny",
    settings=lambda case: {"image_aspect_ratio": case["image_aspect_ratio"] or "anyres_max_9"},
    ask=_ask_onevision,
    recorded_text=lambda text: text.replace("<video>", "<image>"),
    padding_tolerance=5e-4,
)
VL360 = Golden(
    "vl360_tiny",
    settings=lambda case: {},
    ask=_as_recorded("vl360_tiny"),
    recorded_text=lambda text: text.replace("<image>", "<|reserved_special_token_44|>"),
)
VALLEY1 = Golden(
    "valley_v1_tiny",
    settings=lambda case: {
        "prompt_style": {"train": "original_training", "inference": "original_demo"}[case["prompt_style"]],
        "default_system": None,
    },
    ask=_ask_valley1,
    recorded_text=lambda text: text.removeprefix("<s>"),
)
GOLDENS = (VALLEY_EAGLE, VALLEY25, ONEVISION, VL360, VALLEY1)
