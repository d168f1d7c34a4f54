"""The real local engine on a CUDA device that only seems to be there: sampling, judging, greedy answers, weighing."""

import math

import pytest

from tests import tiny_vlms
from tests.cuda_rehearsal.test_training import NARROW, SEPARATE
from tests.test_family_rounds import SETTINGS

GIVEN_TOKENS = 24
VERBS = ("sample", "score", "generate", "loglikelihood")
FULL, VALLEY = "Valley-Eagle-7B with two layers", "valley_eagle_tiny"
CHECKED = "internvl, the check and full sequences"
FAMILIES = [name for name in (*SETTINGS, *tiny_vlms.VLMS) if name not in SEPARATE]
SCENARIOS = {
    # A picture of usual size, the whole vocabulary, heads of the published widths.
    FULL: {"family": "valley-eagle-7b", "layers": 2, "width": 800, "height": 600},
    # More questions than a batch has places for.
    VALLEY: {"family": VALLEY, "num_questions": 3},
    CHECKED: {"family": "internvl", "paths": ["checked"]},
    **{name: {"family": name, "verbs": ["sample", "score"]} for name in FAMILIES if name != VALLEY},
    **{name: {"family": name, "paths": ["checked"], "verbs": ["sample", "score"]} for name in SEPARATE},
}
# Per question, batch and step of decoding the engine may wait here. Every wait lets the device run empty.
OWN_WAITS = {
    # The tokens of a step.
    "align/engines/decoding.py:step (tolist)",
    # What is asked for, once per batch.
    "align/engines/prompts.py:of_segments (tolist)",
    "align/engines/shared_path.py:log_probs (tolist)",
    # Lengths and masks of a batch, which came from the host.
    "align/engines/shared_path.py:",
    "align/prefix/layout.py:build ",
    "align/prefix/log_probs.py:hidden_to_stats (boolean index)",
}
# Full sequences, and the check against them.
UNSHARED_WAITS = {
    "align/engines/unshared_path.py:",
    "align/engines/check.py:_compared ",
    "align/prefix/equivalence.py:",
    "align/prefix/log_probs.py:_paths ",
    "align/prefix/log_probs.py:_path_stats ",
    "align/prefix/plans.py:",
    "align/prefix/token_stats.py:select ",
    "transformers/generation/",
}
# Numbers of images and patches.
MODELS_WAITS = {
    "align/models/",
    "transformers/models/",
    "transformers/vision_utils.py:",
    "transformers/utils/import_utils.py:torch_compilable_check",
}


@pytest.fixture(scope="module")
def answers(rehearse):
    return dict(zip(SCENARIOS, rehearse([("answer", options) for options in SCENARIOS.values()]), strict=True))


def asked(answers, name):
    """`(path, verb, what happened)`."""
    assert "error" not in answers[name], answers[name].get("error")
    paths = SCENARIOS[name].get("paths", ["shared"])
    return [(path, verb, found) for path in paths for verb, found in answers[name][path].items()]


@pytest.mark.parametrize("name", SCENARIOS)
def test_everything_is_answered_with_every_tensor_on_its_device(answers, name):
    options = SCENARIOS[name]
    # Two samples and a further one; two branches with two options; two branches; two times two responses.
    given = 4 * GIVEN_TOKENS
    expected = {"sample": 3 * options.get("num_questions", 2), "score": 4, "generate": 2, "loglikelihood": given}
    found = asked(answers, name)
    assert [verb for _, verb, _ in found] == [*options.get("verbs", VERBS)] * len(options.get("paths", ["shared"]))
    for path, verb, happened in found:
        assert happened["answers"] == expected[verb], (path, verb)


def test_the_check_of_equivalence_is_computed_and_says_that_it_cannot_tell(answers):
    assert answers[CHECKED]["fallback"].startswith("the check cannot tell: rows with positions shifted by one")


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_host_waits_only_where_it_must(answers, name):
    for path, verb, happened in asked(answers, name):
        allowed = (*OWN_WAITS, *MODELS_WAITS, *(UNSHARED_WAITS if path == "checked" else ()))
        assert [wait for wait in happened["waits"] if not wait.startswith(allowed)] == [], (path, verb)


def test_decoding_waits_once_per_step_and_nothing_waits_for_every_token(answers):
    waits = answers[VALLEY]["shared"]["sample"]["waits"]
    # Two batches of questions, of two tokens for the first samples and two for the further ones.
    assert waits["align/engines/decoding.py:step (tolist)"] == 8
    for name, most in ((VALLEY, 10), (CHECKED, 2 * GIVEN_TOKENS)):
        for path, verb, happened in asked(answers, name):
            own = {wait: count for wait, count in happened["waits"].items() if wait.startswith("align/")}
            assert max(own.values()) <= most, (path, verb, own)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in NARROW])
def test_attention_is_always_fused(answers, name):
    for path, verb, happened in asked(answers, name):
        assert {call[0] for call in happened["attention"]} <= {"flash", "efficient"}, (path, verb)


@pytest.mark.parametrize("verb", VERBS)
def test_no_tensor_has_the_square_of_a_prompt_or_the_vocabulary_for_all_of_it(answers, verb):
    found, prompt = answers[FULL], answers[FULL]["prompt_tokens"]
    assert prompt > 1900
    shapes = found["shared"][verb]["shapes"]
    assert shapes
    for shape, operation, place, _ in shapes:
        assert sum(prompt <= size < prompt + 600 for size in shape[-2:]) < 2, (shape, operation, place)
        if shape[-1] == found["vocabulary"]:
            assert math.prod(shape[:-1]) <= 4 * GIVEN_TOKENS, (shape, operation, place)
