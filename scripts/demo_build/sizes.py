"""How large the demo's models are: two of them in half precision must stay under 8 MB."""

from __future__ import annotations

from typing import Any

TILE_PX = 112
PATCH_PX = 14
TOKENS_PER_SIDE = 4

SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "attention_dropout": 0.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 128,
    "image_size": TILE_PX,
    "intermediate_size": 256,
    "layer_norm_eps": 1e-6,
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 4,
    "patch_size": PATCH_PX,
    "vision_use_head": False,
}

EAGLE: dict[str, Any] = {
    "model_type": "qwen2_vl",
    "depth": 2,
    "embed_dim": 64,
    "hidden_act": "quick_gelu",
    "hidden_size": 160,
    "in_channels": 3,
    "mlp_ratio": 3,
    "num_heads": 4,
    "patch_size": PATCH_PX,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}

LANGUAGE: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 400,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}

#: Entries of the projector's visual vocabulary.
VISUAL_WORDS = 192
