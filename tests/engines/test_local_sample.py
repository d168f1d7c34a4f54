"""Sampling behind shared prompts: generate's tokens where greedy, generate's distribution where not."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats

from align.engines import batch_size, shared_path
from align.engines.base import FurtherSamples, SampleRequest, SampleResult, SamplingSettings
from align.engines.batch_size import BatchSizer
from align.engines.decoding import Branches, Decoder, prefill
from align.engines.local import LocalEngine
from align.engines.sampling import SeededSampler
from align.errors import UserError
from align.prefix.attention import PrefixUnsupported, use_shared_prefix
from tests.engines.conftest import collect, decode, question, text_model, text_tokenizer
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
    decoded = decode(model, inputs, lambda logits, *_: logits.argmax(dim=-1), num_samples=2, max_new_tokens=20, eos=eos)
    assert [found.tokens for found in decoded] == [[tokens, tokens] for tokens in expected]
    assert [found.stopped for found in decoded] == [[tokens[-1] in eos] * 2 for tokens in expected]
    assert decoded[0].stopped == [True, True]


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
    for at_a_time in (1, 4):
        assert collect(LocalEngine(*onevision, batch_size=at_a_time), requests, WARM) == first
    fewer = collect(LocalEngine(*onevision), [question(i, num_samples=2) for i in range(6)], WARM)
    assert {key: result.texts for key, result in fewer.items()} == {
        key: result.texts[:2] for key, result in first.items()
    }


def test_the_unshared_path_gives_the_same_samples(onevision: tuple[Any, Any]):
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
    how = SamplingSettings(temperature=temperature, max_new_tokens=depth)
    inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64)}
    vocab, rows, per_row = model.config.vocab_size, 20, num_samples // 20
    inputs = {name: value.repeat(rows, 1) for name, value in inputs.items()}
    sampler = SeededSampler(how, torch.device("cpu"))
    sampler.begin(range(rows), range(rows), per_row, inputs)
    decoded = decode(model, inputs, sampler, num_samples=per_row, max_new_tokens=depth, eos=[])
    index = torch.tensor([found.tokens for found in decoded]).view(-1, depth) @ torch.tensor(
        [vocab**i for i in reversed(range(depth))]
    )
    return torch.bincount(index, minlength=vocab**depth).double().view(*[vocab] * depth)


def test_samples_follow_the_exact_distribution_and_a_wrong_temperature_is_noticed():
    model = tiny_vocabulary()
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
    inputs = {"input_ids": torch.tensor([[1, 3]]).repeat(2000, 1), "attention_mask": torch.ones(2000, 2).long()}
    how = SamplingSettings(temperature=1.0, max_new_tokens=1)
    sampler = SeededSampler(how, torch.device("cpu"))
    sampler.begin(range(2000), range(2000), 2, inputs)
    decoded = decode(model, inputs, sampler, num_samples=2, max_new_tokens=1, eos=[])
    table = torch.zeros(4, 4)
    for first, second in (found.tokens for found in decoded):
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
    sizes: list[int] = []

    def sampler(logits: torch.Tensor, row: torch.Tensor, branch: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        # Branch k of row b ends (token 1) after 2 + 3b + 4k tokens; what else it says is the model's choice.
        sizes.append(len(row))
        said = logits[:, 2:].argmax(dim=-1) + 2
        return torch.where(step + 1 >= 2 + 3 * row + 4 * branch, torch.ones_like(said), said)

    decoded = decode(model, inputs, sampler, num_samples=4, max_new_tokens=30, eos=[1])
    for b, found in enumerate(decoded):
        assert [len(tokens) for tokens in found.tokens] == [2 + 3 * b + 4 * k for k in range(4)]
        longest = found.tokens[-1]
        for tokens in found.tokens:
            assert tokens[:-1] == longest[: len(tokens) - 1], "all branches say the same until they end"
    # Nothing is computed for a branch that has ended: exactly as many tokens as were sampled.
    assert sum(sizes) == sum(2 + 3 * b + 4 * k for b in range(3) for k in range(4))


def test_rows_that_move_together_take_their_questions_along():
    model, inputs = make(SUPPORTED["qwen2"])
    inputs = {name: value[:1].repeat(8, 1) for name, value in inputs.items()}
    inputs["input_ids"][:, 0] = torch.arange(8) + 3
    # Six rows end at once; the seventh ends in the very step in which the last two are moved to the front.
    lengths = torch.tensor([1, 1, 1, 1, 1, 1, 2, 12])

    def sampler(logits: torch.Tensor, row: torch.Tensor, branch: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        said = logits[:, 2:].argmax(dim=-1) + 2
        return torch.where(step + 1 >= lengths[row], 1, said)

    decoded = decode(model, inputs, sampler, num_samples=2, max_new_tokens=20, eos=[1])
    assert [len(found.tokens[0]) for found in decoded] == lengths.tolist()
    for row in (6, 7):
        alone = decode(
            model,
            {name: value[row : row + 1] for name, value in inputs.items()},
            lambda logits, question, branch, step, row=row: sampler(logits, question + row, branch, step),
            num_samples=2,
            max_new_tokens=20,
            eos=[1],
        )
        assert alone[0].tokens == decoded[row].tokens


def test_a_question_is_handed_over_as_soon_as_its_last_sample_has_ended():
    model, inputs = make(SUPPORTED["qwen2"])
    steps, order = [], []

    def sampler(logits: torch.Tensor, row: torch.Tensor, branch: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        steps.append(int(step.max()))
        return torch.where(row == 1, 1, 5)

    decode(
        model,
        inputs,
        sampler,
        num_samples=2,
        max_new_tokens=4,
        eos=[1],
        on_finished=lambda found: order.append((found.ticket, steps[-1], found.stopped)),
    )
    assert order == [(1, 0, [True, True]), (0, 3, [False, False]), (2, 3, [False, False])]


def test_the_prompts_keys_are_stored_once_and_ended_branches_leave_their_columns():
    model, inputs = make(SUPPORTED["qwen2"])
    use_shared_prefix(model)
    width = inputs["input_ids"].shape[1]
    for ends_after, num_columns in ((6, 7 * 5), (2, 7 + 6)):

        def sampler(logits, row, branch, step, ends_after=ends_after):
            # All branches but the first end early; the first takes their columns before it gets new ones.
            return torch.where((branch > 0) & (step + 1 >= ends_after), 1, 5)

        decoder = Decoder(model, sampler, max_new_tokens=6 if ends_after == 6 else 14, eos=[1])
        prompts = prefill(model, inputs, decoder.cache, range(3))
        decoder.add(Branches.behind(prompts, [7] * 3))
        last_columns = 0
        while decoder.num_branches:
            decoder.step()
            if decoder.num_branches:
                last_columns = int(decoder.cache.placement.column.max()) + 1
        # The last token is never read: P + K * (R - 1) keys a question at most, not K * (P + R).
        assert last_columns <= width + num_columns


def one_by_one(model: Any, requests: list[SampleRequest], settings: SamplingSettings) -> dict[str, SampleResult]:
    """What the samples are when nothing stands beside a question."""
    engine = LocalEngine(model, text_tokenizer(), batch_size=1)
    return {key: value for request in requests for key, value in collect(engine, [request], settings).items()}


def test_places_that_are_left_go_to_waiting_questions_and_no_sample_changes(monkeypatch: pytest.MonkeyPatch):
    model = text_model()
    with torch.no_grad():
        model.lm_head.weight[258] *= 2.0  # Ends come early or late.
    settings = SamplingSettings(temperature=1.0, max_new_tokens=24, top_p=0.95)
    requests = [question(i, num_images=0, num_samples=2 + i % 3) for i in range(12)]
    expected = one_by_one(model, requests, settings)
    lengths = {length for result in expected.values() for length in result.num_tokens}
    assert min(lengths) < 8
    assert max(lengths) == 24
    begun: list[tuple[int, int]] = []
    original = shared_path.prefill

    def noting(model: Any, inputs: Any, cache: Any, rows: Any) -> Any:
        begun.append((len(rows), min(rows)))
        return original(model, inputs, cache, rows)

    monkeypatch.setattr(shared_path, "prefill", noting)
    monkeypatch.setattr(batch_size, "CPU_TOKENS", 200)
    for order in (requests, requests[::-1]):
        begun.clear()
        engine = LocalEngine(model, text_tokenizer())
        assert collect(engine, order, settings) == expected
        assert len(begun) > 3, "questions begin while others are being answered"
        assert sum(1 for _, row in begun if row == 0) < len(begun), "beside them"


def test_a_second_call_begins_with_a_whole_batch(onevision: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    original = shared_path.prefill

    def noting(model: Any, inputs: Any, cache: Any, rows: Any) -> Any:
        sizes.append(len(rows))
        return original(model, inputs, cache, rows)

    monkeypatch.setattr(shared_path, "prefill", noting)
    engine = LocalEngine(*onevision)
    collect(engine, [question(i) for i in range(8)], WARM)
    assert sizes[0] == 2, "until one knows how large a question is, and whether prompts can be shared"
    sizes.clear()
    collect(engine, [question(i) for i in range(8)], WARM)
    assert sizes[0] == 8


@pytest.mark.parametrize("shared_prefix", ["on", "off"])
def test_more_samples_are_drawn_behind_the_same_prompt(
    onevision: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, shared_prefix: str
):
    prefills: list[int] = []
    original = shared_path.prefill

    def noting(model: Any, inputs: Any, cache: Any, rows: Any) -> Any:
        prefills.append(len(rows))
        return original(model, inputs, cache, rows)

    monkeypatch.setattr(shared_path, "prefill", noting)
    settings = SamplingSettings(temperature=1.2, max_new_tokens=9, top_p=0.95, repetition_penalty=1.2)
    wanted = {f"q{i}": 2 + 3 * (i % 3) for i in range(7)}
    found: dict[str, SampleResult] = {}
    engine = LocalEngine(*onevision, shared_prefix=shared_prefix)
    engine.sample(
        [question(i, num_samples=2) for i in range(7)],
        settings,
        lambda result: found.__setitem__(result.id, result),
        further=FurtherSamples(lambda result: min(4, wanted[result.id] - len(result.texts))),
    )
    assert {key: len(result.texts) for key, result in found.items()} == wanted
    at_once = [question(i, num_samples=wanted[f"q{i}"]) for i in range(7)]
    assert sum(prefills) == (7 if shared_prefix == "on" else 0)
    assert found == collect(LocalEngine(*onevision), at_once, settings)


@pytest.mark.parametrize("shared_prefix", ["on", "off"])
def test_further_samples_have_a_temperature_of_their_own(onevision: tuple[Any, Any], shared_prefix: str):
    found: dict[str, SampleResult] = {}
    LocalEngine(*onevision, shared_prefix=shared_prefix).sample(
        [question(i, num_samples=2) for i in range(5)],
        SamplingSettings(temperature=0.5, max_new_tokens=6),
        lambda result: found.__setitem__(result.id, result),
        further=FurtherSamples(lambda result: min(2, 2 + int(result.id[1:]) % 4 - len(result.texts)), temperature=1.5),
    )
    at_once = [question(i, num_samples=5) for i in range(5)]
    cool, warm = (
        collect(LocalEngine(*onevision), at_once, SamplingSettings(temperature=t, max_new_tokens=6)) for t in (0.5, 1.5)
    )
    assert {len(result.texts) for result in found.values()} > {2}
    for id_, result in found.items():
        assert result.texts == cool[id_].texts[:2] + warm[id_].texts[2 : len(result.texts)]
        assert result.texts[2:] != cool[id_].texts[2 : len(result.texts)] or len(result.texts) == 2


@pytest.mark.parametrize("shared_prefix", ["on", "off"])
def test_a_greedy_response_comes_before_the_same_samples_and_the_same_further_ones(
    onevision: tuple[Any, Any], shared_prefix: str
):
    def asked(settings: SamplingSettings, num_samples: int, wanted: int) -> dict[str, SampleResult]:
        found: dict[str, SampleResult] = {}
        LocalEngine(*onevision, shared_prefix=shared_prefix, batch_size=2).sample(
            [question(i, num_images=i % 2, num_samples=num_samples) for i in range(4)],
            settings,
            lambda result: found.__setitem__(result.id, result),
            further=FurtherSamples(lambda result: wanted - len(result.texts), temperature=1.5),
        )
        return found

    greedy, sampled = asked(GREEDY, 1, 1), asked(WARM, 2, 4)
    both = asked(replace(WARM, greedy_first=True), 2, 5)
    for id_, result in both.items():
        assert result.token_ids == greedy[id_].token_ids + sampled[id_].token_ids
        assert result.finish_reasons == greedy[id_].finish_reasons + sampled[id_].finish_reasons
        assert result.token_ids[0] not in result.token_ids[1:]


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

    def forgetful(model: Any, inputs: Any, cache: Any, rows: Any) -> Any:
        prompts = prefill(model, inputs, cache, rows)
        for layer in cache.layers:
            layer.values.zero_()
        return prompts

    monkeypatch.setattr(shared_path, "prefill", forgetful)
    engine = LocalEngine(model, text_tokenizer())
    assert collect(engine, requests, WARM) == expected
    assert "differ" in (engine.fallback_reason or "")


def test_running_out_of_memory_halves_the_batch_and_every_question_is_answered_once(
    onevision: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
):
    requests = [question(i) for i in range(9)]
    expected = collect(LocalEngine(*onevision), requests, WARM)
    sizes = []

    def limited(model: Any, inputs: dict[str, torch.Tensor], cache: Any, rows: Any) -> Any:
        sizes.append(len(rows))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(model, inputs, cache, rows)

    monkeypatch.setattr(shared_path, "prefill", limited)
    engine = LocalEngine(*onevision, batch_size=7)
    assert collect(engine, requests, WARM) == expected
    assert engine.fallback_reason is None
    assert sizes == [2, 7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert engine.notes["out_of_memory"].startswith("2 times")


def test_what_ran_out_of_memory_is_let_go_before_the_next_try(
    onevision: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
):
    held: list[weakref.ref] = []

    class Watching(BatchSizer):
        def halve(self, num_items: int) -> None:
            gone.append(held[-1]() is None)
            super().halve(num_items)

    def limited(model: Any, inputs: dict[str, torch.Tensor], cache: Any, rows: Any) -> Any:
        if len(rows) > 1:
            held.append(weakref.ref(cache))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(model, inputs, cache, rows)

    gone: list[bool] = []
    monkeypatch.setattr(shared_path, "prefill", limited)
    engine = LocalEngine(*onevision)
    engine.batch_sizer = Watching(engine.model, 2)
    assert len(collect(engine, [question(i) for i in range(2)], WARM)) == 2
    assert gone == [True]


def test_the_keys_are_let_go_with_the_call(onevision: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    caches: list[weakref.ref] = []

    def noting(model: Any, inputs: Any, cache: Any, rows: Any) -> Any:
        caches.append(weakref.ref(cache))
        return prefill(model, inputs, cache, rows)

    monkeypatch.setattr(shared_path, "prefill", noting)
    engine = LocalEngine(*onevision)
    gc.collect()
    gc.disable()
    try:
        collect(engine, [question(i) for i in range(3)], WARM)
        assert caches
        assert all(cache() is None for cache in caches), "without waiting for the garbage collector"
    finally:
        gc.enable()


@pytest.mark.parametrize("shared_prefix", ["auto", "off"])
def test_logits_that_are_not_finite_are_an_error_and_no_samples(shared_prefix: str):
    model = text_model()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        collect(LocalEngine(model, text_tokenizer(), shared_prefix=shared_prefix), [question(0, num_images=0)], WARM)


def test_one_question_too_large_for_memory_is_an_error_that_says_so(
    onevision: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
):
    def never(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(shared_path, "prefill", never)
    with pytest.raises(UserError, match="single question"):
        collect(LocalEngine(*onevision), [question(0)], WARM)


def test_a_batch_is_as_large_as_the_tokens_allow():
    model = text_model()
    sizer = BatchSizer(model)
    assert sizer.num_items("samples") == 2
    sizer.saw("samples", 1000, 500)
    assert sizer.num_items("samples") == batch_size.CPU_TOKENS // 1000
    assert sizer.num_held("samples") == 2 * (batch_size.CPU_TOKENS // 1000)
    assert sizer.num_items("branches") == 2, "another kind of items"
    sizer.saw("samples", 10**9)
    assert sizer.num_items("samples") == 1
    fixed = BatchSizer(model, fixed=3)
    fixed.saw("samples", 10**9)
    assert fixed.num_items("samples") == fixed.num_held("samples") == 3
    cached, _ = batch_size.token_bytes(model)
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
    model, requests = text_model(), [question(i, num_images=0) for i in range(6)]
    expected = collect(LocalEngine(model, text_tokenizer(), shared_prefix="off"), requests, WARM)
    calls = []

    def refuses_later(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise PrefixUnsupported("images see both ways")
        return prefill(*args, **kwargs)

    monkeypatch.setattr(shared_path, "prefill", refuses_later)
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
    with pytest.raises(UserError, match="question q4: cannot be decoded"):
        engine.sample(requests, WARM, found.append)
    assert [result.id for result in found] == ["q0", "q1", "q2", "q3"]
