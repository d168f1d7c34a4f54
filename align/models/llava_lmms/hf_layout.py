"""LLaVA-OneVision's two layouts on disk, each out of the other: tensor names, config.json,
tokenizer and processor files.

lmms-lab published `LlavaQwenForCausalLM` folders; llava-hf, for transformers and what builds on it (vLLM),
`LlavaOnevisionForConditionalGeneration` folders. The tensors are the same but for names and rows of padding at the end
of the vocabulary, of which llava-hf appended 64. Each config carries the one that it was made from, so that a folder
gets its own config back.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer, Qwen2Config

from align.errors import UserError
from align.models.files import read_json, write_json
from align.models.llava_lmms.configuration import PUBLISHED_TOWER, SIGLIP_DEFAULTS, LlavaQwenConfig
from align.models.messages import IMAGE_MARK, VIDEO_MARK

LMMS, HF = "LlavaQwenForCausalLM", "LlavaOnevisionForConditionalGeneration"
ORIGIN = "converted_from"

TO_HF = (
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.image_newline$", "image_newline"),
    (r"^model\.(?=embed_tokens|layers|norm)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
TO_NATIVE = (
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.(?=embed_tokens|layers|norm)", "model.language_model."),
)
# From the names of llava-hf's files and from those of transformers' classes, old and new.
TO_LMMS = (
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower.vision_tower.vision_model."),
    (r"^(model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^(model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^(model\.)?image_newline$", "model.image_newline"),
    (r"^(model\.)?language_model\.lm_head\.", "lm_head."),
    (r"^(model\.)?language_model\.(model\.)?", "model."),
)
VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
# Rows in llava-hf's files, and in those of lmms-lab that they were made from.
PADDED_ROWS = {152128: 152064, 152000: 151936}

TEXT_KEYS = (
    *("attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range"),
    *("intermediate_size", "max_position_embeddings", "max_window_layers", "num_attention_heads"),
    *("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_scaling", "rope_theta", "sliding_window"),
    *("tie_word_embeddings", "use_cache", "use_sliding_window", "vocab_size"),
)
# What the published configs of lmms-lab say and llava-hf's do not.
LMMS_KEYS: dict[str, Any] = {
    "image_crop_resolution": None,
    "image_split_resolution": None,
    "mm_newline_position": "one_token",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_spatial_pool_mode": "bilinear",
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": f"google/{PUBLISHED_TOWER}",
    "mm_vision_tower_lr": 2e-06,
    "pos_skipping_range": 4096,
    "tokenizer_model_max_length": 32768,
    "tokenizer_padding_side": "right",
    "use_mm_proj": True,
    "use_pos_skipping": False,
    "vision_tower_pretrained": None,
}

_TURN = "'<|im_start|>' + message['role'] + '\\n'"
_DEFAULT_SYSTEM = (
    "{%- if loop.first and message['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
)
_ANSWER = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
LMMS_TEMPLATE = (
    "{%- for message in messages %}" + _DEFAULT_SYSTEM + "{{- " + _TURN + " + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}" + _ANSWER
)
# Marks in front of a message's text are joined by a space and followed by a line break, as `messages.place` does it.
HF_TEMPLATE = (
    "{%- for message in messages %}" + _DEFAULT_SYSTEM + "{{- " + _TURN + " }}"
    "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}"
    "{%- set state = namespace(leading='', written=false) %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] in ('image', 'video') %}"
    "{%- set mark = '<' + part['type'] + '>' %}"
    "{%- if state.written %}{{- mark }}"
    "{%- else %}{%- set state.leading = state.leading + (' ' if state.leading else '') + mark %}{%- endif %}"
    "{%- elif part['text'] %}"
    "{%- if not state.written and state.leading %}{{- state.leading + '\\n' }}{%- endif %}"
    "{%- set state.written = true %}{{- part['text'] }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if not state.written and state.leading %}{{- state.leading + '\\n' }}{%- endif %}"
    "{%- endif %}{{- '<|im_end|>\\n' }}"
    "{%- endfor %}" + _ANSWER
)


def renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """A tensor's name by the first rule that fits it; unchanged where none does.

    >>> renamed("model.mm_projector.2.bias", TO_HF), renamed("language_model.lm_head.weight", TO_LMMS)
    ('multi_modal_projector.linear_2.bias', 'lm_head.weight')
    """
    for pattern, replacement in rules:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return name


def hf_config(source: dict[str, Any], image_token_id: int, dtype: str) -> dict[str, Any]:
    """config.json of llava-hf from that of lmms-lab."""
    config = LlavaQwenConfig.from_dict(dict(source))
    origin = source.get(ORIGIN) or {}
    tower = config.vision_config
    text = {key: source[key] for key in TEXT_KEYS if key in source}
    made = {
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_image_newline_parameter": True,
        "vision_aspect_ratio": config.image_aspect_ratio,
        "vision_config": {
            "model_type": "siglip_vision_model",
            **{key: getattr(tower, key) for key in SIGLIP_DEFAULTS},
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    made = dict(origin["config"]) if origin.get("architecture") == HF else made
    text = {**(made.get("text_config") or {}), **text, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return {
        **made,
        "architectures": [HF],
        "model_type": "llava_onevision",
        "image_token_index": image_token_id,
        "video_token_index": image_token_id + 1,
        "text_config": {**text, "torch_dtype": dtype},
        "torch_dtype": dtype,
        ORIGIN: {"architecture": LMMS, "config": _without_origin(source)},
    }


def lmms_config(source: dict[str, Any], num_rows: int, dtype: str) -> dict[str, Any]:
    """config.json of lmms-lab from that of llava-hf. Raises UserError for a variant that
    lmms-lab's code cannot compute."""
    for key, only in (("vision_feature_layer", -1), ("vision_feature_select_strategy", "full")):
        if source.get(key, only) != only:
            raise UserError(f"expected {key} to be {only!r}, found {source[key]!r}", where="config.json")
    origin = source.get(ORIGIN) or {}
    text = Qwen2Config(**{k: v for k, v in source["text_config"].items() if k not in ("model_type", "architectures")})
    rope = text.rope_parameters or {}
    tower = {
        **SIGLIP_DEFAULTS,
        **{k: v for k, v in (source.get("vision_config") or {}).items() if k in SIGLIP_DEFAULTS},
    }
    made = {
        **{key: getattr(text, key) for key in TEXT_KEYS if not key.startswith("rope_")},
        **LMMS_KEYS,
        "rope_theta": rope.get("rope_theta", 1000000.0),
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "tie_word_embeddings": bool(source.get("tie_word_embeddings") or text.tie_word_embeddings),
        "image_aspect_ratio": source.get("vision_aspect_ratio", "anyres_max_9"),
        "image_grid_pinpoints": source.get("image_grid_pinpoints") or LlavaQwenConfig().image_grid_pinpoints,
        "image_token_index": source.get("image_token_index", 151646),
        "mm_hidden_size": tower["hidden_size"],
        "model_type": "llava_qwen",
        **({} if tower == SIGLIP_DEFAULTS else {"vision_config": tower}),
    }
    made = dict(origin["config"]) if origin.get("architecture") == LMMS else made
    return {
        **made,
        "architectures": [LMMS],
        "vocab_size": num_rows,
        "torch_dtype": dtype,
        ORIGIN: {"architecture": HF, "config": _without_origin(source)},
    }


def rows_for_lmms(config: dict[str, Any], num_rows: int) -> int:
    """How many rows of the vocabulary an lmms-lab folder has, made from a llava-hf one with `num_rows`.

    >>> rows_for_lmms({}, 152128), rows_for_lmms({}, 152064)
    (152064, 152064)
    """
    origin = config.get(ORIGIN) or {}
    if origin.get("architecture") == LMMS:
        return min(num_rows, origin["config"]["vocab_size"])
    return PADDED_ROWS.get(num_rows, num_rows)


def write_hf_companions(source: Path, folder: Path, config: dict[str, Any], num_rows: int) -> int:
    """Tokenizer with `<image>` and `<video>`, and the processor's files; gives the id of `<image>`.

    Raises UserError where the tokenizer's next two ids have no row.
    """
    lmms = LlavaQwenConfig.from_dict(dict(config))
    tokenizer = AutoTokenizer.from_pretrained(source, config=lmms, trust_remote_code=False)
    marks = [AddedToken(mark, special=True, normalized=False) for mark in (IMAGE_MARK, VIDEO_MARK)]
    tokenizer.add_tokens(marks, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids([IMAGE_MARK, VIDEO_MARK])
    if ids[1] != ids[0] + 1 or ids[1] >= num_rows:
        raise UserError(f"expected two free ids below {num_rows} for {IMAGE_MARK} and {VIDEO_MARK}, found {ids}")
    tokenizer.chat_template = HF_TEMPLATE
    tokenizer.save_pretrained(folder)
    edge = lmms.vision_config.image_size
    pixels = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        # The defaults of this image processor are CLIP's, which SigLIP was not trained with.
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "LlavaOnevisionProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": edge, "width": edge},
    }
    pinpoints = {"do_pad": True, "image_grid_pinpoints": lmms.image_grid_pinpoints}
    image = {**pixels, **pinpoints, "image_processor_type": "LlavaOnevisionImageProcessor"}
    write_json(folder / "preprocessor_config.json", image)
    video = {**pixels, "video_processor_type": "LlavaOnevisionVideoProcessor"}
    write_json(folder / "video_preprocessor_config.json", video)
    processor = {
        "image_token": IMAGE_MARK,
        "num_image_tokens": lmms.patches_per_side**2,
        "processor_class": "LlavaOnevisionProcessor",
        "video_token": VIDEO_MARK,
        "vision_aspect_ratio": lmms.image_aspect_ratio,
        "vision_feature_select_strategy": "full",
    }
    write_json(folder / "processor_config.json", processor)
    return ids[0]


def write_lmms_companions(source: Path, folder: Path, num_rows: int) -> None:
    """The tokenizer's files without `<image>` and `<video>`. Raises UserError where another token's row is cut off."""
    for name in ("vocab.json", "merges.txt"):
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())
    highest = -1
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        if (source / name).is_file():
            content = _without_marks(read_json(source / name))
            if name == "tokenizer_config.json":
                content["chat_template"] = LMMS_TEMPLATE
            highest = max(highest, *_token_ids(name, content), -1)
            write_json(folder / name, content)
    if highest >= num_rows:
        raise UserError(f"the tokenizer's highest id is {highest}, but only {num_rows} rows would be kept")
    size = (
        read_json(source / "preprocessor_config.json") if (source / "preprocessor_config.json").is_file() else {}
    ).get("size", {"height": 384, "width": 384})
    pixels = {
        "do_rescale": True,
        "do_resize": True,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    write_json(folder / "preprocessor_config.json", {**pixels, "resample": 3, "rescale_factor": 1 / 255, "size": size})


def _without_origin(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in (ORIGIN, "auto_map")}


def _without_marks(content: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer file without what makes `<image>` and `<video>` tokens."""
    marks = (IMAGE_MARK, VIDEO_MARK)
    kept = {key: value for key, value in content.items() if key not in (*marks, "image_token", "video_token")}
    kept.pop("processor_class", None)
    if isinstance(kept.get("added_tokens"), list):
        kept["added_tokens"] = [entry for entry in kept["added_tokens"] if entry["content"] not in marks]
    if isinstance(kept.get("added_tokens_decoder"), dict):
        decoder = kept["added_tokens_decoder"].items()
        kept["added_tokens_decoder"] = {key: entry for key, entry in decoder if entry["content"] not in marks}
    for name in ("additional_special_tokens", "extra_special_tokens"):
        found = kept.get(name)
        if isinstance(found, list):
            kept[name] = [entry for entry in found if _content(entry) not in marks]
        elif isinstance(found, dict):
            kept[name] = {key: entry for key, entry in found.items() if _content(entry) not in marks}
    return kept


def _content(entry: Any) -> Any:
    return entry.get("content") if isinstance(entry, dict) else entry


def _token_ids(name: str, content: dict[str, Any]) -> list[int]:
    if name == "tokenizer.json":
        vocabulary = (content.get("model") or {}).get("vocab") or {}
        known = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        return [*known, *(entry["id"] for entry in content.get("added_tokens") or [])]
    if name == "added_tokens.json":
        return list(content.values())
    if name == "tokenizer_config.json":
        return [int(key) for key in content.get("added_tokens_decoder") or {}]
    return []
