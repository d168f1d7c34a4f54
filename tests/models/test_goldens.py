"""Every family against what its authors' published code computed (tests/golden, README there)."""

from functools import cache

import numpy as np
import PIL
import pytest
import torch
from packaging.version import Version

from tests.models.goldens import GOLDENS, VALLEY1, Golden

SENTINEL, IGNORED = -200, -100  # one image or video in the recorded ids; what is not trained on
CASES = [pytest.param(golden, name, id=f"{golden.name}-{name}") for golden in GOLDENS for name in golden.cases]
each_case = pytest.mark.parametrize(("golden", "name"), CASES)


def each_batch(longest: int):
    """Several cases at once; those of more tokens cost more than they show."""
    found = [(golden, names) for golden in GOLDENS for names in golden.batches(longest)]
    ids = [f"{golden.name}-{'-'.join(names)}" for golden, names in found]
    return pytest.mark.parametrize(("golden", "names"), found, ids=ids)


@cache
def inputs_of(golden: Golden, name: str):
    return golden.inputs(name)


def images_of(golden, inputs):
    return {key: inputs[key] for key in golden.model.model.image_inputs if key in inputs}


def collapsed(golden, inputs, fill):
    """The values `fill` of all tokens with those of every image's run of placeholders as one sentinel."""
    ids = inputs["input_ids"][0].tolist()
    images = images_of(golden, inputs)
    with torch.no_grad():
        lengths = [len(tokens) for tokens in golden.model.get_image_features(**images).pooler_output] if images else []
    places = golden.model.model.places(inputs["input_ids"])[0].tolist()
    kept, position, rest = [], 0, iter(lengths)
    while position < len(ids):
        length = next(rest) if places[position] else 1
        assert all(places[position : position + length]) == places[position]
        kept.append(SENTINEL if places[position] else fill[position])
        position += length
    assert next(rest, None) is None
    return kept


# Pillow 13, which the recordings were made with, resizes otherwise than earlier versions: with Pillow 11 single pixels
# differ by one level of grey (0.015 when normalised), in one video by up to eight.
# The rest is equal in so far as that allows.
RESIZES_ALIKE = Version(PIL.__version__) >= Version("13")
RESIZED = 0.13


def tolerance(exact, rounded):
    return exact if RESIZES_ALIKE else rounded


@cache
def logits_of(golden, name):
    """`(T, vocabulary)` of a case by itself."""
    with torch.no_grad():
        return golden.model(**inputs_of(golden, name)).logits[0]


def equal(found, recorded, atol):
    np.testing.assert_allclose(np.asarray(found), recorded, rtol=0, atol=atol)


@each_case
def test_ids_equal_the_original(golden, name):
    case, inputs = golden.cases[name], inputs_of(golden, name)
    ids = inputs["input_ids"][0].tolist()
    assert len(ids) == case["seq_len"]
    if "image_tokens" in case:
        assert int(golden.model.model.places(inputs["input_ids"]).sum()) == case["image_tokens"]
    # Valley 1's recording spells every placeholder out.
    found = ids if golden is VALLEY1 else collapsed(golden, inputs, ids)
    assert found == golden.recorded(name, "input_ids").reshape(-1).tolist()


@each_case
def test_the_rendered_text_equals_the_original(golden, name):
    case = golden.cases[name]
    expected = case.get("text") or case["prompt"]
    if golden is VALLEY1:
        # Recorded with the counts of what the text names once.
        for mark in ("<im_patch>*256", *(f"<vi_frame>*{count}" for count in range(8, 0, -1))):
            expected = expected.replace(mark, mark.partition("*")[0])
        expected = expected.replace("<vi_frame><vi_frame>", "<vi_frame>")
    assert golden.recorded_text(golden.text(name)) == expected


@each_case
def test_images_equal_the_original(golden, name):
    case, inputs = golden.cases[name], inputs_of(golden, name)
    shape = golden.recorded(name, "pixel_shape")
    if not images_of(golden, inputs):
        assert shape is None
        assert not case["images"]
        return
    for key, recorded in (("tiles_per_image", "tiles"), ("image_grid_thw", "grid")):
        if (expected := golden.recorded(name, recorded)) is not None:
            assert inputs[key].flatten().tolist() == expected.flatten().tolist()
    if (frames := golden.recorded(name, "frames")) is not None:
        assert len(inputs["pixel_values"]) == int(frames)
    if shape is None:
        assert golden.name == "valley_eagle_tiny"
        return
    pixels = inputs["pixel_values"].numpy()
    assert pixels.size == np.prod(shape)
    assert list(pixels.shape) == shape.tolist()[-pixels.ndim :]
    sample = pixels.reshape(-1)[golden.recorded(name, "pixel_sample_index")]
    equal(sample, golden.recorded(name, "pixel_sample"), tolerance(1e-6, RESIZED))
    for statistic in ("mean", "std"):
        expected = golden.recorded(name, f"pixel_{statistic}")
        if expected is not None and pixels.ndim == 4:
            equal(getattr(pixels, statistic)(axis=(1, 2, 3)), expected.reshape(-1), tolerance(1e-5, 1e-3))


@each_case
def test_what_enters_the_decoder_equals_the_original(golden, name):
    """Localises a wrong splice, newline or order, which logits might blur."""
    norms = golden.recorded(name, "embed_norms")
    if norms is None:
        assert golden.name == "valley_eagle_tiny"
        return
    inputs = inputs_of(golden, name)
    with torch.no_grad():
        embeds = golden.model.model.embed(inputs["input_ids"], None, None, None, **images_of(golden, inputs))[0]
    # A patch adds up what all of its pixels differ by: 0.1 of 5 with Pillow 11.
    np.testing.assert_allclose(embeds.norm(dim=-1), norms.reshape(-1), rtol=1e-5, atol=tolerance(1e-5, RESIZED))
    equal(embeds.mean(dim=0), golden.recorded(name, "embed_mean").reshape(-1), tolerance(1e-4, 0.05))


@each_case
def test_logits_equal_the_original(golden, name):
    logits = logits_of(golden, name).numpy()
    equal(logits[-8:], golden.recorded(name, "logits_tail"), tolerance(1e-4, 0.05))
    equal(logits[-1], golden.recorded(name, "last_logits"), tolerance(1e-4, 0.05))
    equal(logits.mean(axis=0), golden.recorded(name, "logits_mean"), tolerance(1e-4, 0.05))


@each_case
def test_generate_gives_the_original_greedy_tokens(golden, name):
    inputs = inputs_of(golden, name)
    tokens = golden.model.generate(**inputs, max_new_tokens=12, do_sample=False, **golden.greedy)
    assert tokens[0, inputs["input_ids"].shape[1] :].tolist() == golden.cases[name]["greedy"]


@each_batch(longest=3000)
def test_a_batch_of_cases_generates_the_original_greedy_tokens(golden, names):
    inputs = golden.inputs(*names)
    tokens = golden.model.generate(**inputs, max_new_tokens=12, do_sample=False, **golden.greedy)
    assert tokens[:, inputs["input_ids"].shape[1] :].tolist() == [golden.cases[name]["greedy"] for name in names]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@each_batch(longest=1800)
def test_a_padded_batch_equals_one_by_one(golden, names, padding_side):
    batch = golden.inputs(*names, padding_side=padding_side)
    with torch.no_grad():
        together = golden.model(**batch).logits
    for row, name in enumerate(names):
        kept, alone = batch["attention_mask"][row].bool(), logits_of(golden, name)
        torch.testing.assert_close(together[row][kept], alone, rtol=0, atol=golden.padding_tolerance)


@pytest.mark.parametrize(
    ("golden", "name"), [case for case in CASES if case.values[0].recorded(case.values[1], "labels") is not None]
)
def test_the_loss_equals_the_original(golden, name):
    inputs = inputs_of(golden, name)
    recorded = golden.recorded(name, "labels").reshape(-1).tolist()
    num_tokens = inputs["input_ids"].shape[1]
    if len(recorded) < num_tokens:
        rest = iter(recorded)
        places = golden.model.model.places(inputs["input_ids"])[0].tolist()
        starts = [place and not before for before, place in zip([False, *places], places, strict=False)]
        labels = [next(rest) if start or not place else IGNORED for start, place in zip(starts, places, strict=True)]
        assert next(rest, None) is None
        recorded = [IGNORED if label == SENTINEL else label for label in labels]
    with torch.no_grad():
        loss = golden.model(**inputs, labels=torch.tensor([recorded])).loss
    assert loss.item() == pytest.approx(golden.cases[name]["loss"], abs=1e-5)
