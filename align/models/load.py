"""A checkpoint folder in, its model and processor out, decided by `architectures` in its config.json.

Our own families come first, everything else goes to transformers' Auto classes. Folders are checked before a weight is
loaded: what a user can have got wrong is a UserError. No code from a checkpoint is ever run, and pickled weights are
read only where that is asked for.
"""

from __future__ import annotations

import difflib
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from align import accelerator
from align.errors import UserError
from align.models import no_torchvision
from align.models.families import FAMILIES, Family, register
from align.models.files import read_json
from align.models.weights import has_pickle, tensor_table, weight_files

if TYPE_CHECKING:
    from transformers import ProcessorMixin

register()


def load_model(
    folder: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = "sdpa",
    allow_pickle: bool = False,
    quantization: Any = None,
) -> PreTrainedModel:
    """Opens the model of a local folder, or of a Hub name where `HF_HUB_OFFLINE` is not set, in evaluation mode.

    `dtype`: `auto` takes that of the checkpoint. `device`: None leaves the model where transformers loads it, on the
    CPU, or lets DeepSpeed place it. `quantization`: a `BitsAndBytesConfig`, for QLoRA. Every weight must be there.
    Raises UserError for folders and settings that cannot work.
    """
    family = check_checkpoint(folder, allow_pickle=allow_pickle)
    accelerator.avoid_cudnn_attention()
    options: dict[str, Any] = {
        "dtype": _dtype(dtype),
        "attn_implementation": attn_implementation,
        "use_safetensors": None if allow_pickle else True,
        "weights_only": True,
        "output_loading_info": True,
        # They are reported below, with their shapes.
        "ignore_mismatched_sizes": True,
    }
    if device is not None and torch.device(device).type != "cpu":
        options["device_map"] = {"": device}
    if quantization is not None:
        options["quantization_config"] = quantization
    if family is None:
        options["trust_remote_code"] = False
    loader = family.model if family else AutoModelForImageTextToText
    try:
        model, report = loader.from_pretrained(folder, **options)
    except Exception as error:
        # A config.json that is wrong shows in whatever a model's constructor stumbles over.
        raise UserError(f"the checkpoint cannot be opened: {_said(error)}", where=str(folder)) from error
    if report.get("mismatched_keys"):
        name, stored, expected = min(report["mismatched_keys"])
        raise UserError(
            f"{len(report['mismatched_keys'])} weights have other shapes than config.json says, such as {name}: "
            f"{tuple(stored)} in the file, {tuple(expected)} expected",
            where=str(folder),
            fix="check that config.json and the weights belong together",
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"{len(missing)} weights are not in the checkpoint, such as {missing[0]}; they would be random",
            where=str(folder),
            fix="check that config.json and the weights belong together",
        )
    return model.eval()


def check_checkpoint(folder: str | os.PathLike, *, allow_pickle: bool = False) -> Family | None:
    """Look at config.json and, in a local folder, the headers of all weights; gives our family, None for transformers'.

    Raises UserError where the architecture is unknown, or weights are missing, cut or pickled.
    """
    family = _family(folder, read_config(folder))
    if Path(folder).is_dir():
        _check_weights(Path(folder), allow_pickle=allow_pickle)
    return family


def load_processor(folder: str | os.PathLike, **settings: Any) -> Any:
    """Opens the processor of a folder or Hub name; `settings` are those of its class (see `ValleyProcessor`).

    Raises UserError where there is none or a setting is unknown to it.
    """
    config = read_config(folder)
    family = _family(folder, config)
    try:
        if family is not None:
            return family.processor.from_pretrained(folder, **settings)
        known = no_torchvision.processor_class(Path(folder), config) if Path(folder).is_dir() else None
        if known is not None and no_torchvision.needs_torchvision(known):
            processor = no_torchvision.without_video(known).from_pretrained(folder, **settings)
        elif known is not None and known in no_torchvision.ON_PIL.values():
            processor = known.from_pretrained(folder, **settings)
        else:
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False, **settings)
    except Exception as error:
        raise UserError(f"the processor cannot be opened: {_said(error)}", where=str(folder)) from error
    if not hasattr(processor, "tokenizer"):
        raise UserError(
            f"expected a processor of images and text, found {type(processor).__name__}",
            where=str(folder),
            fix="add the model's preprocessor_config.json or processor_config.json",
        )
    _check_settings(processor, settings, folder)
    return processor


def _said(error: Exception) -> str:
    """What an error says in one line, with its kind where that says more."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, OSError, ImportError)) else f"{type(error).__name__}: {text}"


def _check_settings(processor: ProcessorMixin, settings: dict[str, Any], folder: str | os.PathLike) -> None:
    """Raise UserError for a setting that a processor of transformers has swallowed without meaning."""
    known: set[str] = set()
    for part in (processor, getattr(processor, "image_processor", None), processor.tokenizer):
        if part is None:
            continue
        kind = type(part)
        known |= {name for name in dir(kind) if not name.startswith("_")}
        known |= set(getattr(getattr(kind, "valid_kwargs", None), "__annotations__", {}))
        known |= set(inspect.signature(kind.__init__).parameters)
    unknown = [name for name in settings if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise UserError(
            f"its processor ({type(processor).__name__}) has no setting {unknown[0]!r}",
            where=str(folder),
            fix=f"did you mean {near[0]!r}?" if near else "take it out of model.processor",
        )


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """config.json as plain JSON. Raises UserError where there is none that can be read."""
    path = Path(folder)
    if not path.is_dir():
        return _hub_config(str(folder))
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise UserError(
            "expected a whole checkpoint, found a LoRA adapter",
            where=str(path),
            fix="merge it into its base model first",
        )
    if not (path / "config.json").is_file():
        raise UserError("expected a checkpoint folder, found no config.json in it", where=str(path))
    return read_json(path / "config.json")


def context_of(folder: str | os.PathLike) -> int | None:
    """The positions that config.json gives a model; None where it does not say. Raises UserError as `read_config`."""
    config = read_config(folder)
    return {**config, **(config.get("text_config") or {})}.get("max_position_embeddings")


def _hub_config(name: str) -> dict[str, Any]:
    """config.json of a Hub repository; the name must look like one, `owner/name`, and the Hub be allowed."""
    is_hub_name = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    if not is_hub_name or offline:
        reason = "and HF_HUB_OFFLINE forbids to ask the Hub for it" if is_hub_name else ""
        raise UserError(f"there is no such folder {reason}".strip(), where=name, fix="check the path of the checkpoint")
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        raise UserError(f"neither a folder nor a Hub repository that can be reached: {error}", where=name) from error
    return config


def _family(folder: str | os.PathLike, config: dict[str, Any]) -> Family | None:
    """Our family of a config, or None where transformers opens it. Raises UserError where neither does."""
    architecture = (config.get("architectures") or [None])[0]
    native = dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    if architecture is None and config.get("model_type") in native:
        return None
    if architecture in FAMILIES:
        return FAMILIES[architecture]
    names = {name for value in native.values() for name in ([value] if isinstance(value, str) else value)}
    if architecture in names:
        return None
    if config.get("model_type") == "valley_omni":
        raise UserError(
            "this is Valley3, which hears as well as sees; its audio encoder is not supported",
            where=f"{folder}/config.json",
            fix="use Valley-Eagle-7B, Valley2.5 or another vision-language model",
        )
    near = difflib.get_close_matches(str(architecture), [*FAMILIES, *names], n=1)
    raise UserError(
        f"expected the architecture of a vision-language model, found {architecture!r}",
        where=f"{folder}/config.json",
        fix=(
            f"the nearest known one is {near[0]}" if near else f"known are {', '.join(FAMILIES)} and transformers' own"
        ),
    )


def _check_weights(folder: Path, *, allow_pickle: bool) -> None:
    if weight_files(folder):
        tensor_table(folder)
    elif not has_pickle(folder):
        raise UserError("expected weights (model.safetensors), found none", where=str(folder))
    elif not allow_pickle:
        raise UserError(
            "the weights are pickled (.bin), which is not opened by default",
            where=str(folder),
            fix="convert them to safetensors, or set model.allow_pickle=true if you trust their author",
        )


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise UserError(f"expected a dtype such as auto, float32 or bfloat16, found {dtype!r}")
    return found


def quiet() -> None:
    """Keeps transformers' progress bars and advice off a terminal that has its own."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
