"""Sampling behind shared prompts: generate's tokens where greedy, generate's distribution where not."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from scipy import stats

from align.engines import batch_size as budget_module
from align.engines import local
from align.engines.base import SampleRequest, SamplingSettings
from align.engines.decoding import Branches, decode, prefill
from align.engines.local import LocalEngine
from align.engines.shared_path import sample_behind
from align.errors import UserError
from align.prefix.attention import use_shared_prefix
from tests.engines.conftest import collect, question, text_model, text_tokenizer
from tests.prefix.prefix_models import SUPPORTED, gemma3_sliding, make

GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=12)
WARM = SamplingSettings(temperature=1.2, max_new_tokens=12, top_p=0.95)


def generated(model: Any, inputs: dict[str, torch.Tensor], row: int, max_new_tokens: int, eos: list[int]) -> list[int]:
    """Stock generate, greedy, on one row of right-padded inputs by itself."""
    length = int(inputs["attention_mask"][row].sum())
    one = {}
    for name, value in inputs.items():
        one[name] = value[row : row + 1]
        if value.shape == inputs["input_ids"].shape:
            one[name] = one[name][:, :length]
    if "image_grid_thw" in inputs:
        counts = inputs["image_grid_thw"].prod(dim=1).tolist()
        one["pixel_values"] = inputs["pixel_values"].split(counts)[row]
    out = model.generate(
        **one, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=0, repetition_penalty=1.0
    )
    return out[0, length:].tolist()


@pytest.mark.parametrize("family", [name for name in SUPPORTED if name != "valley_eagle"])
def test_greedy_branches_are_generates_tokens_in_every_family(family: str):
    model, inputs = make(SUPPORTED[family])
    rows = range(len(inputs["input_ids"]))
    free = [generated(model, inputs, row, 20, []) for row in rows]
    # A token that one row says early ends it there, while others go on: rows then leave the batch one by one.
    eos = [free[0][4]]
    expected = [generated(model, inputs, row, 20, eos) for row in rows]
    use_shared_prefix(model)
    decoded = sample_behind(
        model, inputs, lambda logits, *_: logits.argmax(dim=-1), num_samples=2, max_new_tokens=20, eos=eos
    )
    assert decoded.tokens == [[tokens, tokens] for tokens in expected]
    assert decoded.stopped == [[tokens[-1] in eos] * 2 for tokens in expected]
    assert decoded.stopped[0] == [True, True]


def test_greedy_samples_are_generates_text_through_the_processor(onevision: tuple[Any, Any]):
    model, processor = onevision
    engine = LocalEngine(model, processor)
    requests = [question(i, num_images=i % 3) for i in range(5)]
    found = collect(engine, requests, GREEDY)
    assert engine.fallback_reason is None, engine.notes
    for request in requests:
        text = processor.apply_chat_template(request.messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], images=[list(request.images)] if request.images else None, return_tensors="pt")
        out = model.generate(**inputs, do_sample=False, max_new_tokens=12)
        expected = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert found[request.id].texts == (expected,) * 3


def test_samples_do_not_depend_on_order_batch_or_how_many_there_are(onevision: tuple[Any, Any]):
    requests = [question(i, num_samples=4) for i in range(6)]
    first = collect(LocalEngine(*onevision), requests, WARM)
    assert len({text for result in first.values() for text in result.texts}) > 20, "samples differ"
    backwards = collect(LocalEngine(*onevision), requests[::-1], WARM)
    assert backwards == first
    for batch_size in (1, 4):
        assert collect(LocalEngine(*onevision, batch_size=batch_size), requests, WARM) == first
    fewer = collect(LocalEngine(*onevision), [question(i, num_samples=2) for i in range(6)], WARM)
    assert {key: result.texts for key, result in fewer.items()} == {
        key: result.texts[:2] for key, result in first.items()
    }


def test_the_plain_path_gives_the_same_samples(onevision: tuple[Any, Any]):
    requests = [question(i) for i in range(3)]
    engine = LocalEngine(*onevision, shared_prefix="off")
    assert collect(engine, requests, WARM) == collect(LocalEngine(*onevision), requests, WARM)
    assert engine.fallback_reason is not None
    assert "switched off" in engine.notes["shared_prefix"]


def test_a_penalty_for_repetition_is_the_same_on_both_paths_and_changes_the_samples(onevision: tuple[Any, Any]):
    requests = [question(i) for i in range(2)]
    how = SamplingSettings(temperature=1.0, max_new_tokens=12, top_k=40, repetition_penalty=1.5)
    shared = collect(LocalEngine(*onevision), requests, how)
    assert collect(LocalEngine(*onevision, shared_prefix="off"), requests, how) == shared
    without = SamplingSettings(temperature=1.0, max_new_tokens=12, top_k=40)
    assert collect(LocalEngine(*onevision), requests, without) != shared


def test_extras_of_the_checkpoints_generation_config_change_nothing(onevision: tuple[Any, Any]):
    from transformers import GenerationConfig

    model, processor = onevision
    before, requests = model.generation_config, [question(0)]
    expected = collect(LocalEngine(model, processor), requests, WARM)
    try:
        model.generation_config = GenerationConfig(
            eos_token_id=before.eos_token_id, repetition_penalty=2.0, top_k=1, min_new_tokens=9, temperature=0.01
        )
        for path in ("on", "off"):
            assert collect(LocalEngine(model, processor, shared_prefix=path), requests, WARM) == expected
    finally:
        model.generation_config = before


def branch_probabilities(model: Any, prompt: list[int], depth: int, temperature: float) -> torch.Tensor:
    """Exact probability of every continuation of `depth` tokens, by enumeration: `(V,) * depth`."""
    vocab = model.config.vocab_size
    paths = torch.cartesian_prod(*[torch.arange(vocab)] * depth)
    ids = torch.cat([torch.tensor(prompt).expand(len(paths), -1), paths], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, len(prompt) - 1 : -1]
    log_p = (logits / temperature).log_softmax(dim=-1).gather(2, paths[:, :, None])[:, :, 0].sum(dim=1)
    return log_p.exp().double().view(*[vocab] * depth)


def sample_counts(model: Any, prompt: list[int], depth: int, temperature: float, num_samples: int) -> torch.Tensor:
    from align.engines.sampling import SeededSampler, uniforms

    how = SamplingSettings(temperature=temperature, max_new_tokens=depth)
    inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64)}
    vocab, rows, per_row = model.config.vocab_size, 20, num_samples // 20
    inputs = {name: value.repeat(rows, 1) for name, value in inputs.items()}
    sampler = SeededSampler(how, uniforms(range(rows), per_row, depth), inputs["input_ids"])
    decoded = sample_behind(model, inputs, sampler, num_samples=per_row, max_new_tokens=depth, eos=[])
    index = torch.tensor(decoded.tokens).view(-1, depth) @ torch.tensor([vocab**i for i in reversed(range(depth))])
    return torch.bincount(index, minlength=vocab**depth).double().view(*[vocab] * depth)


def test_samples_follow_the_exact_distribution_and_a_wrong_temperature_is_noticed():
    model = tiny_vocabulary()
    use_shared_prefix(model)
    prompt, depth, num_samples = [1, 3, 0, 2], 3, 4000
    counts = sample_counts(model, prompt, depth, 0.8, num_samples)
    expected = branch_probabilities(model, prompt, depth, 0.8) * num_samples
    assert float(expected.min()) > 1.0, "every continuation is expected"
    assert abs(float(expected.sum()) - num_samples) < 1e-2
    right = stats.chisquare(counts.flatten().numpy(), expected.flatten().numpy(), sum_check=False).pvalue
    assert right > 0.01
    wrong = branch_probabilities(model, prompt, depth, 1.0) * num_samples
    assert stats.chisquare(counts.flatten().numpy(), wrong.flatten().numpy(), sum_check=False).pvalue < 1e-6


def test_branches_of_a_question_are_independent():
    model = tiny_vocabulary()
    use_shared_prefix(model)
    from align.engines.sampling import SeededSampler, uniforms

    inputs = {"input_ids": torch.tensor([[1, 3]]).repeat(2000, 1), "attention_mask": torch.ones(2000, 2).long()}
    how = SamplingSettings(temperature=1.0, max_new_tokens=1)
    sampler = SeededSampler(how, uniforms(range(2000), 2, 1), inputs["input_ids"])
    decoded = sample_behind(model, inputs, sampler, num_samples=2, max_new_tokens=1, eos=[])
    table = torch.zeros(4, 4)
    for first, second in decoded.tokens:
        table[first[0], second[0]] += 1
    assert stats.chi2_contingency(table.numpy()).pvalue > 0.01


def tiny_vocabulary() -> Any:
    """Four tokens, none of which ends anything, with predictions neither flat nor certain."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.13)
    return model


def test_ended_branches_leave_the_batch_and_the_others_do_not_notice():
    model, inputs = make(SUPPORTED["qwen2"])
    use_shared_prefix(model)
    widths: list[tuple[int, int, int]] = []

    def choose(logits: torch.Tensor, row: torch.Tensor, branch: torch.Tensor, step: int) -> torch.Tensor:
        # Branch k of row b ends (token 1) after 2 + 3b + 4k tokens; what else it says is the model's choice.
        widths.append((step, int(row.unique().numel()), len(row)))
        generated_ids = logits[:, 2:].argmax(dim=-1) + 2
        return torch.where(step + 1 >= 2 + 3 * row + 4 * branch, torch.ones_like(generated_ids), generated_ids)

    decoded = sample_behind(model, inputs, choose, num_samples=4, max_new_tokens=30, eos=[1])
    for b, row in enumerate(decoded.tokens):
        assert [len(tokens) for tokens in row] == [2 + 3 * b + 4 * k for k in range(4)]
        longest = row[-1]
        for tokens in row:
            assert tokens[:-1] == longest[: len(tokens) - 1], "all branches say the same until they end"
    assert widths[0][1:] == (3, 12)
    assert widths[-1][2] <= 2, "at the end only what still grows is computed"
    assert [size for _, _, size in widths] == sorted((size for _, _, size in widths), reverse=True)


def test_a_question_is_handed_over_as_soon_as_its_last_sample_has_ended():
    model, inputs = make(SUPPORTED["qwen2"])
    use_shared_prefix(model)
    steps, order = [], []

    def choose(logits: torch.Tensor, row: torch.Tensor, branch: torch.Tensor, step: int) -> torch.Tensor:
        steps.append(step)
        return torch.where(row == 1, 1, 5)

    sample_behind(
        model,
        inputs,
        choose,
        num_samples=2,
        max_new_tokens=4,
        eos=[1],
        on_row=lambda b, tokens, stopped: order.append((b, steps[-1], stopped)),
    )
    assert order == [(1, 0, [True, True]), (0, 3, [False, False]), (2, 3, [False, False])]


def test_the_prompts_keys_are_stored_once():
    model, inputs = make(SUPPORTED["qwen2"])
    use_shared_prefix(model)
    mask = inputs["attention_mask"].bool()
    cache, hidden = prefill(model, inputs, torch.arange(mask.shape[1]).expand(mask.shape))
    shape = (len(mask), 7)
    branches = Branches(
        cache=cache,
        visible=mask[:, None].expand(-1, 7, -1),
        position=mask.sum(dim=1)[:, None].expand(shape),
        hidden=hidden[:, -1:].expand(-1, 7, -1),
        alive=torch.ones(shape, dtype=torch.bool),
    )
    decode(model, branches, lambda logits, *_: logits.argmax(dim=-1), max_new_tokens=5, eos_token_ids=[])
    # The fifth token is never read: P + K * (R - 1) keys a question, not K * (P + R).
    assert cache.get_seq_length() == mask.shape[1] + 7 * 4


def test_a_sliding_window_falls_back_and_says_so():
    model, _ = make(gemma3_sliding)
    model.resize_token_embeddings(261)
    model.generation_config.eos_token_id = 258
    tokenizer = text_tokenizer()
    requests = [question(i, num_images=0) for i in range(3)]
    engine = LocalEngine(model, tokenizer)
    found = collect(engine, requests, WARM)
    assert "sliding" in (engine.fallback_reason or "")
    assert "sliding" in engine.notes["shared_prefix"]
    assert collect(LocalEngine(model, tokenizer, shared_prefix="off"), requests, WARM) == found
    with pytest.raises(UserError, match="sliding"):
        collect(LocalEngine(model, tokenizer, shared_prefix="on"), requests, WARM)


def test_a_model_whose_cache_is_wrong_falls_back_before_anything_is_kept(monkeypatch: pytest.MonkeyPatch):
    model = text_model()
    requests = [question(i, num_images=0) for i in range(3)]
    expected = collect(LocalEngine(model, text_tokenizer(), shared_prefix="off"), requests, WARM)

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        cache, hidden = prefill(*args, **kwargs)
        for layer in cache.layers:
            layer.values.zero_()
        return cache, hidden

    monkeypatch.setattr("align.engines.shared_path.prefill", forgetful)
    engine = LocalEngine(model, text_tokenizer())
    assert collect(engine, requests, WARM) == expected
    assert "differ" in (engine.fallback_reason or "")


def test_running_out_of_memory_halves_the_batch_and_every_question_is_answered_once(
    onevision: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
):
    requests = [question(i) for i in range(9)]
    expected = collect(LocalEngine(*onevision), requests, WARM)
    sizes = []

    def limited(model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample_behind(model, inputs, *args, **kwargs)

    monkeypatch.setattr(local, "sample_behind", limited)
    engine = LocalEngine(*onevision, batch_size=7)
    assert collect(engine, requests, WARM) == expected
    assert engine.fallback_reason is None
    assert sizes == [2, 7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert engine.notes["out_of_memory"].startswith("2 times")


def test_what_ran_out_of_memory_is_let_go_before_the_next_try(
    onevision: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
):
    held: list[weakref.ref] = []

    class Watching(budget_module.BatchSizer):
        def halve(self, num_items: int) -> None:
            gone.append(held[-1]() is None)
            super().halve(num_items)

    def limited(model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        if len(inputs["input_ids"]) > 1:
            cache = torch.zeros(1)
            held.append(weakref.ref(cache))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample_behind(model, inputs, *args, **kwargs)

    gone: list[bool] = []
    monkeypatch.setattr(local, "sample_behind", limited)
    engine = LocalEngine(*onevision)
    engine.batch_sizer = Watching(engine.model, 2)
    assert len(collect(engine, [question(i) for i in range(2)], WARM)) == 2
    assert gone == [True]


@pytest.mark.parametrize("shared_prefix", ["auto", "off"])
def test_logits_that_are_no_numbers_are_an_error_and_no_samples(shared_prefix: str):
    model = text_model()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(UserError, match="not numbers"):
        collect(LocalEngine(model, text_tokenizer(), shared_prefix=shared_prefix), [question(0, num_images=0)], WARM)


def test_one_question_too_large_for_memory_is_an_error_that_says_so(
    onevision: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
):
    def never(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(local, "sample_behind", never)
    with pytest.raises(UserError, match="single question"):
        collect(LocalEngine(*onevision), [question(0)], WARM)


def test_a_batch_is_as_large_as_the_tokens_allow():
    model = text_model()
    found = budget_module.BatchSizer(model)
    assert found.num_items(1000, 500) == budget_module.CPU_TOKENS // 1000
    assert found.num_items(10**9) == 1
    assert budget_module.BatchSizer(model, fixed=3).num_items(10**9) == 3
    cached, _ = budget_module.token_bytes(model)
    # Two layers, keys and values, two heads of width 8, four bytes each.
    assert cached == 2 * 2 * 2 * 8 * 4


def test_two_requests_may_share_an_id_neither_is_lost(onevision: tuple[Any, Any]):
    found = []
    requests = [question(0), SampleRequest("q0", question(1).messages, question(1).images, 3, 5)]
    LocalEngine(*onevision).sample(requests, WARM, found.append)
    assert len(found) == 2


def test_valley_eagle_samples_through_its_own_processor_with_images_and_without():
    from pathlib import Path

    from align.models.load import load_model, load_processor

    folder = Path(__file__).parents[1] / "golden" / "valley_eagle_tiny"
    model = load_model(folder, dtype=torch.float32)
    processor = load_processor(folder, max_pixels=28 * 28 * 8)
    requests = [question(i, num_images=i % 2, num_samples=2) for i in range(3)]
    engine = LocalEngine(model, processor)
    how = SamplingSettings(temperature=0.0, max_new_tokens=6)
    found = collect(engine, requests, how)
    assert engine.fallback_reason is None, engine.notes
    for request in requests:
        text = processor.apply_chat_template(request.messages, add_generation_prompt=True, tokenize=False)
        images = [list(request.images)] if request.images else None
        inputs = processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=6, repetition_penalty=1.0)
        expected = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert found[request.id].texts == (expected,) * 2
    warm = collect(LocalEngine(model, processor), requests, WARM)
    assert collect(LocalEngine(model, processor, shared_prefix="off"), requests, WARM) == warm


def test_a_refusal_after_the_first_batch_falls_back_and_loses_nothing(monkeypatch: pytest.MonkeyPatch):
    from align.prefix.attention import PrefixUnsupported

    model, requests = text_model(), [question(i, num_images=0) for i in range(6)]
    expected = collect(LocalEngine(model, text_tokenizer(), shared_prefix="off"), requests, WARM)
    calls = []

    def refuses_later(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise PrefixUnsupported("images see both ways")
        return sample_behind(*args, **kwargs)

    monkeypatch.setattr(local, "sample_behind", refuses_later)
    engine = LocalEngine(model, text_tokenizer(), batch_size=2)
    assert collect(engine, requests, WARM) == expected
    assert "images see both ways" in engine.notes["shared_prefix"]


def test_an_image_that_cannot_be_opened_is_raised_for_its_own_batch(onevision: tuple[Any, Any]):
    def open_image(handle: Any) -> Any:
        if handle == "broken":
            raise UserError("cannot be decoded", where="broken")
        return handle

    requests = [question(i) for i in range(5)]
    requests[4] = SampleRequest("q4", requests[4].messages, ("broken",), 3, 7)
    engine = LocalEngine(*onevision, open_image=open_image, batch_size=2)
    found = []
    with pytest.raises(UserError, match="broken"):
        engine.sample(requests, WARM, found.append)
    assert [result.id for result in found] == ["q0", "q1", "q2", "q3"]
