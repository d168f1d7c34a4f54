"""Hidden states or whole rows in, per-token log-probabilities (and what TRL's metrics want beside) out.

`forward_segments` runs the backbone once over rows `[prompt | segments]` and projects only the positions that predict
a segment's token; logits of the prompt are never made. `unshared_segments` gives the same values from separate full
sequences: the peer in the equivalence check, and the fallback. Log-probabilities are natural logarithms in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Partial
from transformers import PreTrainedModel

from align.prefix.attention import PrefixUnsupported, active_layout
from align.prefix.layout import Layout, Segment
from align.prefix.rows import backbone_of, padded_left, row_inputs
from align.prefix.token_stats import OUTPUTS, TokenStats, token_stats


@dataclass(frozen=True)
class Head:
    """The vocabulary projection: `weight` `(V, H)`, `bias` `(V,)` or None, and what the text config does to logits."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float


def head_of(model: PreTrainedModel) -> Head:
    """The model's vocabulary projection; under FSDP2 its parameters are gathered."""
    layer = model.get_output_embeddings()
    if hasattr(layer, "lora_A"):
        raise PrefixUnsupported("an adapter sits on the vocabulary projection")
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if hasattr(weight, "full_tensor"):
        weight, bias = _whole(weight), bias if bias is None else _whole(bias)
    config = model.config.get_text_config()
    return Head(weight, bias, getattr(config, "final_logit_softcapping", None), _logit_scale(config))


def _whole(parameter: Any) -> Tensor:
    """A parameter that FSDP2 has spread, gathered, so that its gradient is the mean over the processes.

    Left to itself the gradient of `full_tensor` is taken to be the same everywhere, and every process keeps its own
    share of its own gradient.
    """
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _logit_scale(config: Any) -> float:
    """What the model multiplies its logits by: every family has its own name for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # Granite and MiniCPM divide by it, HyperCLOVA X multiplies.
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def segment_hidden_states(model: PreTrainedModel, prompt_inputs: Mapping[str, Any], layout: Layout) -> Tensor:
    """`(B, S, H)`: for every segment token the hidden state that predicts it, from one pass over the whole rows."""
    with active_layout(layout) as plan:
        output = backbone_of(model)(**row_inputs(model, prompt_inputs, layout), use_cache=False, return_dict=True)
    require_every_layer(model, plan.num_calls)
    hidden = output.last_hidden_state
    return hidden.gather(1, layout.predicted_at[:, :, None].expand(-1, -1, hidden.shape[-1]))


def require_every_layer(model: PreTrainedModel, num_calls: int) -> None:
    """Raise PrefixUnsupported when some layers did not go through the attention (state-space layers, own kernels)."""
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if num_calls < num_layers:
        raise PrefixUnsupported(f"only {num_calls} of the model's {num_layers} layers use the set attention")


def hidden_to_stats(
    model: nn.Module,
    hidden: Tensor,
    layout: Layout,
    outputs: Sequence[str] = ("log_probs",),
    temperature: float = 1.0,
) -> TokenStats:
    """From `segment_hidden_states` to statistics `(B, S)`, zero on padding."""
    head = head_of(model)
    real = layout.is_token.to(hidden.device)
    stats = token_stats(
        hidden[real].to(head.weight.device),
        head.weight,
        head.bias,
        layout.input_ids.to(hidden.device)[real].to(head.weight.device),
        outputs=outputs,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        temperature=temperature,
    )
    return stats.scatter(real.to(head.weight.device))


def forward_segments(
    model: PreTrainedModel,
    prompt_inputs: Mapping[str, Any],
    layout: Layout,
    outputs: Sequence[str] = ("log_probs",),
    *,
    temperature: float = 1.0,
) -> TokenStats:
    """Statistics `(B, S)` of every segment token at a sampling temperature, every prompt encoded once.

    `prompt_inputs` is what a processor returned for the prompts, right-padded. The model must have been given to
    `use_shared_prefix`. Raises PrefixUnsupported where its architecture does not allow a shared prefix.
    """
    return hidden_to_stats(model, segment_hidden_states(model, prompt_inputs, layout), layout, outputs, temperature)


def unshared_segments(
    model: PreTrainedModel,
    prompt_inputs: Mapping[str, Any],
    layout: Layout,
    outputs: Sequence[str] = ("log_probs",),
    *,
    temperature: float = 1.0,
    left_padding: int = 0,
) -> TokenStats:
    """The values of `forward_segments` from separate full sequences, one forward of the batch per path.

    Positions and masks are the model's own. Every forward has all rows, so that images need no taking apart.
    `left_padding` tokens in front of every sequence change no value but for rounding.
    """
    total: dict[str, Tensor | None] = dict.fromkeys(OUTPUTS)
    for paths in _paths(layout):
        stats = _path_stats(
            model, prompt_inputs, layout, paths, outputs=outputs, temperature=temperature, left_padding=left_padding
        )
        for name in OUTPUTS:
            value, before = getattr(stats, name), total[name]
            if value is not None:
                total[name] = value if before is None else (before | value if name == "is_top1" else before + value)
    assert total["log_probs"] is not None, "a layout without segments"
    return TokenStats(**total)  # type: ignore[arg-type]


def _paths(layout: Layout) -> list[list[tuple[list[int], set[int]]]]:
    """Per forward and row: the segments of one path, and those of them whose values are read from it."""
    per_row = []
    for ancestors, segment in zip(layout.ancestors.tolist(), layout.segment.tolist(), strict=True):
        present = sorted({s for s in segment if s >= 0})
        leaves = [s for s in present if not any(ancestors[t][s] for t in present if t != s)]
        paths, read = [], set[int]()
        for leaf in leaves:
            path = [s for s in present if ancestors[leaf][s]]
            paths.append((path, set(path) - read))
            read.update(path)
        per_row.append(paths)
    longest = max((len(paths) for paths in per_row), default=0)
    nothing: tuple[list[int], set[int]] = ([], set())
    return [[paths[i] if i < len(paths) else nothing for paths in per_row] for i in range(longest)]


def _path_stats(
    model: PreTrainedModel,
    prompt_inputs: Mapping[str, Any],
    layout: Layout,
    paths: list[tuple[list[int], set[int]]],
    *,
    outputs: Sequence[str],
    temperature: float,
    left_padding: int,
) -> TokenStats:
    """Statistics in the shape of `layout`, zero for tokens that are not read from these paths."""
    device = layout.input_ids.device
    segments, token_ids = layout.segment.tolist(), layout.input_ids.tolist()
    columns = [
        [i for i, s in enumerate(segment) if s in set(path)] for segment, (path, _) in zip(segments, paths, strict=True)
    ]
    single = Layout.build(
        layout.prompt_mask.cpu(),
        [[Segment([ids[i] for i in column])] for ids, column in zip(token_ids, columns, strict=True)],
        pad_token_id=0,
    ).to(device)
    inputs = padded_left(row_inputs(model, prompt_inputs, single, packed=True), left_padding)
    hidden = backbone_of(model)(**inputs, use_cache=False, return_dict=True).last_hidden_state[:, left_padding:]
    # A packed row has its first segment token right behind the last real prompt token.
    lengths = layout.prompt_lengths[:, None]
    offsets = torch.arange(single.input_ids.shape[1], device=device)[None]
    predicted_at = (lengths + offsets - 1).clamp(max=hidden.shape[1] - 1)
    hidden = hidden.gather(1, predicted_at[:, :, None].expand(-1, -1, hidden.shape[-1]))
    stats = hidden_to_stats(model, hidden, single, outputs, temperature)
    chosen = torch.zeros(layout.input_ids.shape, dtype=torch.bool)
    taken = torch.zeros(single.input_ids.shape, dtype=torch.bool)
    for b, (column, (_, read)) in enumerate(zip(columns, paths, strict=True)):
        wanted = torch.tensor([segments[b][i] in read for i in column], dtype=torch.bool)
        chosen[b, column] = wanted
        taken[b, : len(column)] = wanted
    return stats.select(taken.to(device)).scatter(chosen.to(device))
