"""The demo's Valley-Eagle: how it is made, how rows go through it, and how it answers while it is being trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from align.models.valley_eagle.configuration import ValleyEagleConfig
from align.models.valley_eagle.modeling import ValleyQwen2ForCausalLM
from demo_build.pixels import eagle_grid, eagle_pixels, siglip_pixels
from demo_build.rows import NUM_IMAGE_TOKENS, TURN, RowMaker, Rows
from demo_build.sizes import EAGLE, LANGUAGE, SIGLIP, TILE_PX, TOKENS_PER_SIDE, VISUAL_WORDS

#: Gain of the layer norm before the projector's softmax: with 1 the mixture of visual words starts nearly uniform
#: and learns slowly.
WORD_GAIN = 3.0


def make_config(tokenizer: PreTrainedTokenizerFast) -> ValleyEagleConfig:
    return ValleyEagleConfig(
        **LANGUAGE,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        vision_config=SIGLIP,
        eagle_vision_config=EAGLE,
        mm_projector_type="ovis_conv_adapter",
        mlp_hidden_dim=VISUAL_WORDS,
        vit_crop_size=TILE_PX,
        num_patches_per_side=TOKENS_PER_SIDE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, towers: dict[str, Path], seed: int) -> ValleyQwen2ForCausalLM:
    """A fresh language model and projector on pre-trained towers."""
    torch.manual_seed(seed)
    model = ValleyQwen2ForCausalLM(make_config(tokenizer))
    with torch.no_grad():
        model.model.mm_projector.mlp[1].weight.fill_(WORD_GAIN)
        model.model.mm_projector.embedding.weight.normal_(0.0, 0.5)
    model.model.vision_tower.vision_tower.load_state_dict(torch.load(towers["siglip"], weights_only=True))
    model.model.qwen2vl_vision_tower.load_state_dict(torch.load(towers["eagle"], weights_only=True))
    return model


def image_features(model: ValleyQwen2ForCausalLM, pixels: np.ndarray) -> torch.Tensor:
    """`(B, 112, 112) uint8` to `(B, 48, D)` visual tokens."""
    patches = model.model.vision_tower.vision_tower(siglip_pixels(pixels)).last_hidden_state
    tile = model.model.mm_projector(patches)
    eagle = model.model.qwen2vl_vision_tower(eagle_pixels(pixels), grid_thw=eagle_grid(len(pixels))).pooler_output
    eagle = eagle.reshape(len(pixels), -1, tile.shape[-1])
    features = torch.cat([tile, tile, eagle], dim=1)
    assert features.shape[1] == NUM_IMAGE_TOKENS
    return features


def hidden_states(
    model: ValleyQwen2ForCausalLM,
    rows: Rows,
    *,
    look: bool = True,
    noise: float = 0.0,
    halfway: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """`(B, L, D)`, what the language model's head reads; without `look` no gradient goes to encoders and projector.

    The shared part goes through the layers once, and the branches as a batch behind its keys and values: of the square
    of a packed row, most would be masked. `noise` blurs what is seen, each picture by up to so many standard deviations
    of its tokens. To `halfway` is added what the branches are before the last layer, `(B, L, D)`.
    """
    with torch.set_grad_enabled(look and torch.is_grad_enabled()):
        features = image_features(model, rows.pixels)
    if noise:
        strength = noise * torch.rand(len(features), 1, 1) * features.detach().std()
        features = features + strength * torch.randn_like(features)
    num_shared = int((rows.branch[0] == 0).sum())
    shared = model.model(input_ids=rows.ids[:, :num_shared], image_features=features.flatten(0, 1), use_cache=True)
    owner, columns, real = _branches(rows, num_shared)
    past = shared.past_key_values
    past.batch_select_indices(owner)
    passed: list[torch.Tensor] = []
    hook = model.model.layers[-1].register_forward_pre_hook(lambda _, args: passed.append(args[0]))
    behind = model.model(
        input_ids=rows.ids[owner[:, None], columns],
        position_ids=rows.positions[owner[:, None], columns],
        attention_mask=torch.cat([torch.ones(len(owner), num_shared, dtype=torch.bool), real], 1),
        past_key_values=past,
        use_cache=True,
    ).last_hidden_state
    hook.remove()
    places = owner[:, None].expand_as(columns)[real], columns[real]
    hidden = behind.new_zeros(*rows.ids.shape, behind.shape[-1])
    if halfway is not None:
        halfway.append(hidden.clone())
        halfway[-1][places] = passed[0][real]
    hidden[:, :num_shared] = shared.last_hidden_state
    hidden[places] = behind[real]
    return hidden


def _branches(rows: Rows, num_shared: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per branch its row `(R,)`, its columns there `(R, longest) int64`, and which of them are real `(R, longest)`."""
    begins = torch.ones_like(rows.branch, dtype=torch.bool)
    begins[:, 1:] = rows.branch[:, 1:] != rows.branch[:, :-1]
    owner, first = (begins & (rows.branch > 0)).nonzero(as_tuple=True)
    length = (rows.branch[owner] == rows.branch[owner, first][:, None]).sum(1)
    steps = torch.arange(int(length.max()))
    real = steps < length[:, None]
    return owner, torch.where(real, first[:, None] + steps, num_shared), real


def loss_of(model: ValleyQwen2ForCausalLM, rows: Rows, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cross-entropy over the learned tokens; `weight` `(B, L)` weighs them by the position of the label."""
    hidden = hidden_states(model, rows)
    target = rows.labels[:, 1:]
    learned = target >= 0
    logits = model.lm_head(hidden[:, :-1][learned])
    each = F.cross_entropy(logits.float(), target[learned], reduction="none")
    if weight is None:
        return each.mean()
    weights = weight[:, 1:][learned]
    return (each * weights).sum() / weights.sum()


@torch.no_grad()
def respond(
    model: ValleyQwen2ForCausalLM,
    maker: RowMaker,
    pixels: np.ndarray,
    questions: Sequence[str],
    *,
    temperature: float = 0.0,
    num_samples: int = 1,
    max_new_tokens: int = 24,
) -> list[list[str]]:
    """For every picture and its question `num_samples` responses; temperature 0 is greedy."""
    model.eval()
    prompts = [maker.shared + maker.encode(question) + maker.encode(TURN) for question in questions]
    length = max(map(len, prompts))
    ids = torch.tensor([[maker.pad] * (length - len(p)) + p for p in prompts])
    real = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    features = image_features(model, pixels)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=ids,
        attention_mask=real,
        position_ids=positions,
        image_features=features.flatten(0, 1),
        use_cache=True,
        logits_to_keep=1,
    )
    past, logits = out.past_key_values, out.logits[:, -1].float().repeat_interleave(num_samples, 0)
    past.batch_repeat_interleave(num_samples)
    real, positions = real.repeat_interleave(num_samples, 0), positions.repeat_interleave(num_samples, 0)
    said, ended, at = [], torch.zeros(len(real), dtype=torch.bool), positions[:, -1:]
    for _ in range(max_new_tokens):
        if temperature:
            token = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
        else:
            token = logits.argmax(-1)
        token = torch.where(ended, maker.pad, token)
        said.append(token)
        ended |= token == maker.tokenizer.eos_token_id
        if ended.all():
            break
        real, at = torch.cat([real, real.new_ones(len(real), 1)], 1), at + 1
        out = model(
            input_ids=token[:, None], attention_mask=real, position_ids=at, past_key_values=past, use_cache=True
        )
        logits = out.logits[:, -1].float()
    texts = maker.tokenizer.batch_decode(torch.stack(said, 1), skip_special_tokens=True)
    model.train()
    return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]
