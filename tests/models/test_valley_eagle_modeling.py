"""The model's maths where the goldens do not reach: other projectors, one encoder, memory saving, attention, ranks."""

import copy

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from align.models.valley_eagle import ValleyEagleConfig, ValleyQwen2ForCausalLM
from align.models.valley_eagle.modeling import PROJECTORS
from tests.forks import in_two_processes
from tests.models import tiny_valley

TENSORS = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


def image(width=150, height=90, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def inputs_for(processor, *images_per_sample, **options):
    conversations = [[{"role": "user", "content": "what is this"}] for _ in images_per_sample]
    return processor.apply_chat_template(conversations, images=list(images_per_sample), **{**TENSORS, **options})


def as_map(tokens, side):
    """(side * side, D) row by row to a nested list of vectors."""
    return [[tokens[row * side + column] for column in range(side)] for row in range(side)]


def reference_convolution(weight, bias, grid):
    """3 x 3, stride 2, zero padding 1, written out over nested lists of vectors."""
    side = len(grid)
    rows = []
    for top in range(-1, side - 1, 2):
        for left in range(-1, side - 1, 2):
            total = bias.clone()
            for i in range(3):
                for j in range(3):
                    row, column = top + i, left + j
                    if 0 <= row < side and 0 <= column < side:
                        total = total + weight[:, :, i, j] @ grid[row][column]
            rows.append(total)
    return torch.stack(rows)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


@pytest.mark.parametrize("tokenize_function", ["softmax", "st_argmax"])
def test_the_ovis_projector_follows_its_formula(tokenize_function):
    torch.manual_seed(0)
    projector = PROJECTORS["ovis_conv_adapter"](tiny_valley.config(tokenize_function=tokenize_function))
    patches = torch.randn(2, 64, 16)
    got = projector(patches)
    for tile in range(2):
        convolved = reference_convolution(projector.conv.weight, projector.conv.bias, as_map(patches[tile], 8))
        scores = convolved @ projector.mlp[0].weight.T
        centred = scores - scores.mean(dim=-1, keepdim=True)
        scores = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        scores = scores * projector.mlp[1].weight + projector.mlp[1].bias
        if tokenize_function == "softmax":
            words = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
            expected = words @ projector.embedding.weight
        else:
            expected = projector.embedding.weight[scores.argmax(dim=-1)]
        torch.testing.assert_close(got[tile], expected, rtol=0, atol=2e-6)


def test_straight_through_argmax_has_the_gradient_of_the_softmax():
    torch.manual_seed(0)
    soft = PROJECTORS["ovis_conv_adapter"](tiny_valley.config())
    hard = PROJECTORS["ovis_conv_adapter"](tiny_valley.config(tokenize_function="st_argmax"))
    hard.load_state_dict(soft.state_dict())
    patches, direction = torch.randn(1, 64, 16), torch.randn(1, 16, 32)
    for projector in (soft, hard):
        (projector(patches) * direction).sum().backward()
    torch.testing.assert_close(hard.conv.weight.grad, soft.conv.weight.grad, rtol=1e-5, atol=1e-6)


def test_the_softmax_may_be_taken_in_float32():
    torch.manual_seed(0)
    plain = PROJECTORS["ovis_conv_adapter"](tiny_valley.config(mlp_hidden_dim=2000)).bfloat16()
    upcast = PROJECTORS["ovis_conv_adapter"](
        tiny_valley.config(mlp_hidden_dim=2000, projector_softmax_fp32=True)
    ).bfloat16()
    upcast.load_state_dict(plain.state_dict())
    exact = copy.deepcopy(plain).float()
    patches = torch.randn(1, 64, 16).bfloat16()
    assert upcast(patches).dtype == torch.bfloat16
    expected = exact(patches.float())
    assert (upcast(patches) - expected).abs().mean() <= (plain(patches) - expected).abs().mean()


def test_the_convolutional_projector_follows_its_formula():
    torch.manual_seed(0)
    projector = PROJECTORS["conv_adapter"](tiny_valley.config(mm_projector_type="conv_adapter"))
    patches = torch.randn(1, 64, 16)
    hidden = gelu(patches[0] @ projector.mlp[0].weight.T + projector.mlp[0].bias)
    hidden = hidden @ projector.mlp[2].weight.T + projector.mlp[2].bias
    expected = reference_convolution(projector.conv.weight, projector.conv.bias, as_map(hidden, 8))
    torch.testing.assert_close(projector(patches)[0], expected, rtol=0, atol=2e-6)


def test_the_shuffling_projector_follows_its_formula():
    torch.manual_seed(0)
    config = tiny_valley.config(
        mm_projector_type="mlp_pixel_shuffle", pixelshuffle_downsample_ratio=2, num_patches_per_side=4
    )
    projector = PROJECTORS["mlp_pixel_shuffle"](config)
    patches = torch.randn(1, 64, 16)
    grid = as_map(patches[0], 8)
    blocks = torch.stack(
        [
            torch.cat([grid[2 * row + i][2 * column + j] for i in range(2) for j in range(2)])
            for row in range(4)
            for column in range(4)
        ]
    )
    hidden = gelu(blocks @ projector.mlp[0].weight.T + projector.mlp[0].bias)
    expected = hidden @ projector.mlp[2].weight.T + projector.mlp[2].bias
    torch.testing.assert_close(projector(patches)[0], expected, rtol=0, atol=2e-6)


def test_tiles_are_arranged_as_the_image_and_padding_is_left_out():
    model, processor = tiny_valley.model(), tiny_valley.processor()
    inputs = inputs_for(processor, [image(300, 180)])  # 2 x 2 tiles of 112: the image is 224 x 135 on 224 x 224
    features = model.get_image_features(**{name: inputs[name] for name in processor.model_input_names[2:]})
    with torch.no_grad():
        tiles = model.model.mm_projector(model.model.vision_tower(inputs["pixel_values"]))
        eagle = model.model.qwen2vl_vision_tower(inputs["eagle_pixel_values"], inputs["image_grid_thw"]).pooler_output
    # 8 x 8 map; 180 * (8 / 300) = 4.8, so 4 rows, slack 4, rows 2 to 5.
    kept = [
        tiles[1 + 2 * (row // 4) + column // 4, 4 * (row % 4) + column % 4]
        for row in range(2, 6)
        for column in range(8)
    ]
    expected = torch.cat([tiles[0], torch.stack(kept), eagle])
    torch.testing.assert_close(features.pooler_output[0], expected, rtol=0, atol=1e-6)
    assert len(expected) == processor.num_image_tokens(300, 180)


def test_a_map_above_the_limit_is_averaged():
    changes = {"max_vision_token": 16 + 10}
    model, processor = tiny_valley.model(**changes), tiny_valley.processor(**changes)
    inputs = inputs_for(processor, [image(300, 180)])
    full = tiny_valley.model().get_image_features(**{name: inputs[name] for name in processor.model_input_names[2:]})
    pooled = model.get_image_features(**{name: inputs[name] for name in processor.model_input_names[2:]})
    # A map of 4 x 8 for at most 10 tokens: sqrt(10 / 0.5) = 4.47 columns, times 0.5 rows: 2 x 4, blocks of 2 x 2.
    blocks = full.pooler_output[0][16:48].view(2, 2, 4, 2, 32).mean(dim=(1, 3)).reshape(8, 32)
    torch.testing.assert_close(pooled.pooler_output[0][16:24], blocks, rtol=0, atol=1e-6)
    assert len(pooled.pooler_output[0]) == processor.num_image_tokens(300, 180)


@pytest.mark.parametrize("projector", ["ovis_conv_adapter", "conv_adapter"])
def test_without_the_second_encoder_tiles_follow_each_other(projector):
    changes = {"eagle": False, "mm_projector_type": projector, "max_vision_token": 50}
    model, processor = tiny_valley.model(**changes), tiny_valley.processor(**changes)
    inputs = inputs_for(processor, [image(300, 180)])
    assert "eagle_pixel_values" not in inputs
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["tiles_per_image"], inputs["image_sizes"])
        tiles = model.model.mm_projector(model.model.vision_tower(inputs["pixel_values"]))
        model(**inputs)
    # 5 tiles of 16 tokens are more than 50: sqrt(50 / 5) = 3.2, so each is averaged to 3 x 3.
    maps = tiles.view(5, 4, 4, 32).permute(0, 3, 1, 2)
    expected = F.adaptive_avg_pool2d(maps, 3).permute(0, 2, 3, 1).reshape(45, 32)
    torch.testing.assert_close(features.pooler_output[0], expected, rtol=0, atol=1e-6)
    assert processor.num_image_tokens(300, 180) == 45


def test_features_given_equal_images_given():
    model, processor = tiny_valley.model(), tiny_valley.processor()
    inputs = inputs_for(processor, [image()], [image(60, 60), image(seed=1)])
    visual = {name: inputs.pop(name) for name in processor.model_input_names[2:]}
    with torch.no_grad():
        features = torch.cat(model.get_image_features(**visual).pooler_output)
        torch.testing.assert_close(model(**inputs, image_features=features).logits, model(**inputs, **visual).logits)


def test_too_few_placeholders_are_refused():
    model, processor = tiny_valley.model(), tiny_valley.processor()
    inputs = inputs_for(processor, [image()])
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name][:, :20]
    with pytest.raises(ValueError, match="was the sequence truncated"):
        model(**inputs)


def test_logits_to_keep_gives_the_last_logits():
    model, processor = tiny_valley.model(), tiny_valley.processor()
    inputs = inputs_for(processor, [image()])
    with torch.no_grad():
        full = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, logits_to_keep=3).logits, full[:, -3:])
        torch.testing.assert_close(model(**inputs, logits_to_keep=torch.tensor([5, 2])).logits, full[:, [5, 2]])


def test_several_sequences_a_prompt_are_each_prompts_own():
    model, processor = tiny_valley.model(), tiny_valley.processor()
    inputs = inputs_for(processor, [image()], [], [image(60, 60), image(seed=1)])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    alone = model.generate(**inputs, **options)
    beams = model.generate(**inputs, **options, num_beams=2, num_return_sequences=2)
    torch.manual_seed(0)
    sampled = model.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=3
    )
    assert beams.shape[0] == 6
    assert torch.equal(sampled, alone.repeat_interleave(3, dim=0))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    processor = tiny_valley.processor()
    inputs = inputs_for(processor, [image()], [image(60, 60)], padding_side="right")
    gradients = []
    for saving in (False, True):
        model = tiny_valley.model().train()
        # Frozen encoders are the hard case: a reentrant checkpoint would lose the projector's gradient without a word.
        model.model.vision_tower.requires_grad_(False)
        model.model.qwen2vl_vision_tower.requires_grad_(False)
        if saving:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append(
            {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        )
    assert gradients[0]["model.mm_projector.conv.weight"].abs().sum() > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_every_trainable_weight_gets_a_gradient():
    model, processor = tiny_valley.model().train(), tiny_valley.processor()
    inputs = inputs_for(processor, [image()])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert without == []
    head = model.model.vision_tower.vision_tower.head
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_an_attention_function_of_ones_own_reaches_the_decoder_only():
    seen = []

    def spy(module, *args, **kwargs):
        seen.append(type(module).__name__)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    processor = tiny_valley.processor()
    inputs = inputs_for(processor, [image()])
    for switch in ("config", "method"):
        model = tiny_valley.model()
        with torch.no_grad():
            plain = model(**inputs).logits
            if switch == "config":
                model.config._attn_implementation = "spy"
            else:
                model.set_attn_implementation("spy")
            seen.clear()
            torch.testing.assert_close(model(**inputs).logits, plain)
        assert seen == ["Qwen2Attention"] * 2
        assert model.config.vision_config._attn_implementation == "sdpa"


def _train_step(folder):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = torch.nn.parallel.DistributedDataParallel(tiny_valley.model().train())
    processor = tiny_valley.processor()
    inputs = inputs_for(processor, [image()] if rank == 0 else [])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    (folder / f"{rank}.txt").write_text(repr(float(model.module.model.mm_projector.conv.weight.grad.norm())))
    # What reduces gradients goes before the group that it uses, and nobody leaves while another still needs it.
    del model
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_a_rank_without_images_keeps_step_with_one_that_has_some(tmp_path):
    in_two_processes(_train_step, tmp_path)
    norms = [float((tmp_path / f"{rank}.txt").read_text()) for rank in range(2)]
    assert norms[0] == norms[1] > 0


def test_the_full_size_model_has_the_published_weights():
    with torch.device("meta"):
        model = ValleyQwen2ForCausalLM(ValleyEagleConfig())
    weights = model.state_dict()
    assert len(weights) == 1184
    assert sum(tensor.numel() for tensor in weights.values()) == 8_880_402_624
    assert sum(tensor.numel() for tensor in weights.values()) * 2 == 17_760_805_248
    projector = {name: tensor for name, tensor in weights.items() if ".mm_projector." in name}
    assert sum(tensor.numel() for tensor in projector.values()) == 163_561_088
    assert sum(t.numel() for name, t in weights.items() if ".vision_tower." in name) == 428_225_600
    assert sum(t.numel() for name, t in weights.items() if ".qwen2vl_vision_tower." in name) == 675_759_104
    assert model.config.rope_parameters["rope_theta"] == 1_000_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "linear"}, "expected mm_projector_type to be one of ovis_conv_adapter"),
        ({"tokenize_function": "gumbel_argmax"}, "expected tokenize_function to be softmax, st_argmax"),
        ({"only_navit": True}, "only_navit"),
        ({"vit_crop_size": 384}, "expected vit_crop_size to equal vision_config.image_size, found 384 and 112"),
        ({"num_patches_per_side": 14}, "the projector gives 4 tokens"),
        ({"eagle_vision_config": {**tiny_valley.QWEN2VL, "hidden_size": 64}}, "found 64 and 32"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_valley.config(**changes)
