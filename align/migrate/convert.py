"""Keys and values of another trainer in, the values of an align.yaml out, with what became of every key.

What they leave out has their default there and ours here, so theirs are written where they differ.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config import build_config
from align.errors import UserError
from align.migrate.read import read_settings
from align.migrate.tables import (
    BFLOAT16,
    BY_ADAPTER,
    BY_NAMES,
    HERE,
    LEFT_OUT,
    NAMES,
    SIXTEEN,
    THEIRS,
    TOOLS,
    TWICE,
)
from align.strict_yaml import parse_yaml

# A value of these that is not in the table is another method, not a setting that can be left out.
METHOD = ("stage", "rlhf_type", "pref_loss")
ADAPTERS = ("finetuning_type", "tuner_type", "train_type")
FOUR_BITS = {"load_in_4bit": True, "quant_bits": 4}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
# A key that only one of the three knows.
_MARKS = {
    "ms-swift": ("rlhf_type", "tuner_type", "train_type", "model"),
    "llama-factory": ("stage", "finetuning_type", "pref_beta", "pref_loss", "template", "cutoff_len"),
    "trl": ("model_name_or_path",),
}


@dataclass
class Conversion:
    """`values`: what stands in align.yaml. `carried`: their key to ours; `left`: their key to why it has no place here.

    `added`: settings of ours that hold what they left out. `data`: the command that reads their pairs.
    """

    tool: str
    data: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    added: dict[str, Any] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """What became of every key, for people."""
        yield f"read as a configuration of {NAMES[self.tool]}"
        yield from (f"  {theirs} -> {ours}" for theirs, ours in self.carried.items())
        if self.added:
            yield "left out there, and otherwise here:"
            yield from (f"  {name}: {value}" for name, value in self.added.items())
        if self.left:
            yield "not carried over:"
            yield from (f"  {theirs}: {why}" for theirs, why in self.left.items())


def migrate(path: Path, given: dict[str, str | None]) -> Conversion:
    """What a file of another trainer is here, with values of ours (None for nothing) in the place of theirs.

    Raises:
        UserError: it cannot be read, is of another method, or what comes of it could not be opened.
    """
    from align.dpo.settings import check_fields

    done = convert(read_settings(path))
    done.values |= {key: value for key, value in given.items() if value is not None}
    done.values.setdefault("policy", "path/to/checkpoint")
    check_fields(build_config(done.values, base=path.parent, where=str(path)).dpo)
    return done


def tool_of(settings: dict[str, Any]) -> str:
    """Which trainer's keys these are.

    Raises:
        UserError: none of the three has such keys.
    """
    for tool, marks in _MARKS.items():
        if any(mark in settings for mark in marks):
            return tool
    raise UserError(
        f"no keys of TRL, LLaMA-Factory or ms-swift: {', '.join(list(settings)[:10])}",
        fix="name the file that their command reads, or the script that holds the command",
    )


def convert(settings: dict[str, Any], tool: str | None = None) -> Conversion:
    """What the settings are here.

    Raises:
        UserError: they are of no trainer that is known, or of a method that is not here.
    """
    found = _Converter(settings, tool or tool_of(settings))
    for key, value in settings.items():
        found.take(key, value)
    found.finish()
    return found.done


class _Converter:
    def __init__(self, settings: dict[str, Any], tool: str) -> None:
        self.tool, self.table = tool, TOOLS[tool]
        self.settings = settings = {key: _number(value) for key, value in settings.items() if value is not None}
        self.done = Conversion(tool, data_command(settings, tool), {"rounds": 1})
        self.frozen: dict[str, bool] = {}
        self.no_limit = False
        self.sft: float | None = None
        self.by_value: dict[str, list[tuple[Any, str]]] = {}
        for row, text in self.table.items():
            key, is_value, value = row.partition(": ")
            if is_value:
                self.by_value.setdefault(key, []).append((parse_yaml(value), text))
        kinds = [settings[key] for key in ADAPTERS if key in settings]
        if any(kind not in ("lora", "full") for kind in kinds):
            raise UserError(f"{NAMES[tool]}'s {kinds[0]!r} is not here", fix="lora and full are")
        self.adapter = bool(settings.get("use_peft")) if tool == "trl" else "full" not in kinds

    def take(self, key: str, value: Any) -> None:
        """Carry one of their keys over, or say why not."""
        if value is None and key != "max_length":
            self._leave(key, "nothing is set")
            return
        value = _number(value)
        self.no_limit = self.no_limit or value is None
        text = next((text for known, text in self.by_value.get(key, ()) if known == value), self.table.get(key))
        if text is None:
            self._unknown(key, value)
        elif text.startswith("-"):
            self._leave(key, text[1:].strip() or "nothing here is decided by it")
        elif text == "sft":
            self.sft = value
            self._carry(key, "dpo.loss_type, dpo.loss_weights")
        elif text.startswith("freeze "):
            self.frozen[text.removeprefix("freeze ")] = bool(value)
            self._carry(key, "dpo.freeze")
        elif ".lora." in text and not self.adapter:
            self._leave(key, "no adapter is trained")
        elif text == "dpo.lora.quantize" and not any(self.settings.get(k) == v for k, v in FOUR_BITS.items()):
            self._leave(key, "the policy is not loaded in four bits")
        elif text.startswith(("dpo.held_out", "dpo.keep")) and not self._looks:
            self._leave(key, "nothing is evaluated there")
        else:
            self._put(key, value, text)

    @property
    def _looks(self) -> bool:
        """Whether they look at held-out pairs while they train."""
        given = self.settings
        if self.tool == "ms-swift":
            return bool(given.get("split_dataset_ratio") or given.get("val_dataset"))
        return given.get("eval_strategy", "no") not in ("no", False)

    def _unknown(self, key: str, value: Any) -> None:
        from align.dpo.settings import OWN_FIELDS, trl_fields

        if key in METHOD:
            raise UserError(
                f"{NAMES[self.tool]}'s {key}: {value} is not here",
                fix="here are DPO and the losses of TRL's DPOTrainer",
            )
        if key in self.by_value:
            known = ", ".join(str(known) for known, _ in self.by_value[key])
            self._leave(key, f"{value!r} is not known here, but {known}")
        elif key in OWN_FIELDS:
            self._leave(key, OWN_FIELDS[key])
        elif key == "eval_steps" and not self._looks:
            self._leave(key, "nothing is evaluated there")
        elif key in trl_fields():
            self._put(key, value, f"dpo.{key}")
        elif key.isupper():
            self._leave(key, "a variable of the environment, for whoever reads it")
        else:
            self._leave(key, "there is no such setting here")

    def _put(self, key: str, value: Any, text: str) -> None:
        is_list, text = text.startswith("list "), text.removeprefix("list ")
        name, is_constant, constant = text.partition(": ")
        if is_list:
            value = value if isinstance(value, list) else [word.strip() for word in str(value).split(",")]
        _set(self.done.values, name, parse_yaml(constant) if is_constant else value, keep=bool(is_constant))
        self._carry(key, text)

    def _carry(self, key: str, ours: str) -> None:
        self.done.carried[key] = ours

    def _leave(self, key: str, why: str) -> None:
        self.done.left[key] = why

    def finish(self) -> None:
        """Put in what several keys decide together, and what they leave out."""
        dpo = self.done.values.setdefault("dpo", {})
        if self.sft:
            kinds = dpo.get("loss_type", ["sigmoid"])
            kinds = kinds if isinstance(kinds, list) else [kinds]
            dpo["loss_weights"] = [*dpo.get("loss_weights", [1.0] * len(kinds)), self.sft]
            dpo["loss_type"] = [*kinds, "sft"]
        if self._looks and "eval_steps" not in dpo:
            dpo["eval_steps"] = self.done.added["dpo.eval_steps"] = self._steps_between_looks()
        for name, all_three in LEFT_OUT.items():
            if _get(self.done.values, name) is not None or (".lora." in name and not self.adapter):
                continue
            value = self._theirs(all_three[list(TOOLS).index(self.tool)])
            if name == "dpo.freeze":
                value = [part for part, frozen in (dict.fromkeys(value, True) | self.frozen).items() if frozen]
            if value not in (THEIRS, HERE.get(name)) and not (name == "dpo.max_length" and self.no_limit):
                _set(self.done.values, name, value)
                if name != "dpo.freeze" or not self.frozen.keys() >= set(value):
                    self.done.added[name] = value
        if not dpo:
            del self.done.values["dpo"]

    def _steps_between_looks(self) -> float:
        """As transformers and ms-swift take it: what is logged or saved by, or the share that an epoch is."""
        given = self.settings
        if given.get("eval_strategy") == "epoch":
            return 1 / float(given.get("num_train_epochs", 3))
        if self.tool == "ms-swift":
            return given.get("save_steps", 500)
        return given.get("logging_steps", 10 if self.tool == "trl" else 500)

    def _theirs(self, default: Any) -> Any:
        given = self.settings
        if default == BY_ADAPTER:
            return 1e-4 if self.adapter else 1e-5
        if default == TWICE:
            return 2 * given.get("lora_rank", 8)
        if default == BFLOAT16:
            return "bfloat16" if self.adapter and given.get("bf16") else THEIRS
        if default == BY_NAMES:
            named = "target_regex" in given or given.get("target_modules", "all-linear") != "all-linear"
            return [] if self.adapter and named else ["vision", "projector"]
        if default == SIXTEEN:
            processes = given.get("NPROC_PER_NODE", 1) * given.get("NNODES", 1)
            at_a_time = given.get("per_device_train_batch_size", 1) * processes
            return max(1, -(-16 // at_a_time))
        return default


def data_command(settings: dict[str, Any], tool: str) -> str:
    """The command that reads their pairs, as far as one file or data set is named."""
    name = settings.get("dataset_name" if tool == "trl" else "dataset")
    if not isinstance(name, str) or "," in name:
        return "align data SOURCE --out data"
    options = {"subset": settings.get("dataset_config"), "split": settings.get("dataset_train_split")}
    if tool == "ms-swift":
        name, _, limit = name.partition("#")
        options["limit"] = limit or None
    elif tool == "llama-factory":
        folder = str(settings.get("dataset_dir", "data"))
        options |= {"subset": name, "limit": settings.get("max_samples")}
        name = f"{folder}/dataset_info.json"
    words = [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]
    return shlex.join(["align", "data", name, *words, "--out", "data"])


def _number(value: Any) -> Any:
    """A number for one in quotes, anything else as it is.

    >>> _number("5e-7"), _number("8"), _number("8B")
    (5e-07, 8, '8B')
    """
    number = parse_yaml(value) if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else None
    return value if number is None else number


def _get(values: dict[str, Any], dotted: str) -> Any:
    found: Any = values
    for name in dotted.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _set(values: dict[str, Any], dotted: str, value: Any, *, keep: bool = False) -> None:
    *sections, last = dotted.split(".")
    for name in sections:
        values = values.setdefault(name, {})
    if not (keep and last in values):
        values[last] = value
