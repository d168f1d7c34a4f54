"""Prompt files: what becomes of a good one, and what is said about a bad one before anything runs."""

from __future__ import annotations

import pytest

from reward.errors import RewardError
from reward.prompt import KINDS, built_in_prompts, load_prompt, parse_prompt

BUILT_IN = {
    "pairwise": "pairwise",
    "pairwise_short": "pairwise",
    "pointwise": "pointwise",
    "claims": "claims",
    "claims_split": "split",
}
GOOD = """---
options: {first: one, second: two}
---
Q [{question}] A [{first}] B [{second}] Which?
"""


def test_every_built_in_prompt_passes_its_own_check():
    assert built_in_prompts() == sorted(BUILT_IN)
    for name, kind in BUILT_IN.items():
        prompt = load_prompt(name, kind)
        assert prompt.kind == kind
        assert len(prompt.digest) == 64


def test_the_pairwise_prompts_keep_the_published_structure():
    for name in ("pairwise", "pairwise_short"):
        turn = load_prompt(name, "pairwise").fill((), "What?", [("a cat", "a dog")]).turn(0)
        assert "Question: [What?]\nThe first response: [a cat]\nThe second response: [a dog]" in turn


def test_what_all_branches_share_stands_in_the_head_and_a_first_response_in_the_first_piece():
    prompt = parse_prompt(GOOD, "pairwise").fill(("picture",), "What?", [("x", "y"), ("x", "z")])
    assert prompt.images == ("picture",)
    assert prompt.head == "Q [What?] A ["
    assert prompt.branches == (("x] B [", "y"), ("x] B [", "z"))
    assert prompt.tail == "] Which?"
    assert prompt.options == ("one", "two")
    assert prompt.turn(1) == "Q [What?] A [x] B [z] Which?"


def test_slots_and_braces_inside_questions_and_responses_stay_text():
    prompt = parse_prompt(GOOD, "pairwise").fill((), "{first}?", [("{second}", "{question} {}")])
    assert prompt.turn(0) == "Q [{first}?] A [{second}] B [{question} {}] Which?"


def test_doubled_braces_and_json_are_text():
    prompt = parse_prompt('Write {"score": 1} or {{first}}: {question} {response}', "pointwise")
    assert prompt.fill((), "q", [("r",)]).turn(0) == 'Write {"score": 1} or {first}: q r'


def test_a_persons_own_file_is_found_by_its_path(tmp_path):
    path = tmp_path / "mine.md"
    path.write_text(GOOD.replace("\n", "\r\n"), encoding="utf-8")
    prompt = load_prompt(path, "pairwise")
    assert prompt.options == {"first": "one", "second": "two"}
    assert "\r" not in prompt.fill((), "q", [("a", "b")]).turn(0)


def test_an_unknown_name_says_what_there_is(tmp_path):
    with pytest.raises(RewardError, match=r"pairwize.*did you mean pairwise\?.*pointwise.*path"):
        load_prompt("pairwize", "pairwise")
    with pytest.raises(RewardError, match="nowhere"):
        load_prompt(tmp_path / "nowhere.md", "pairwise")


def test_a_file_that_is_not_text_is_reported(tmp_path):
    path = tmp_path / "binary.md"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(RewardError, match="cannot be read"):
        load_prompt(path, "pairwise")


HEADING = "---\noptions: {first: one, second: two}\n---\n"
BAD = [
    ("pairwise", HEADING + "{question} {first}", r"missing slot \{second\}"),
    ("pairwise", HEADING + "{first} {second}", r"missing slot \{question\}"),
    ("pairwise", HEADING + "{question} {first} {second} {third}", r"unknown slot \{third\}.*\{question\}, \{first\}"),
    ("pairwise", HEADING + "{image} {question} {first} {second}", r"\{image\}: images always stand before"),
    ("pairwise", HEADING + "{question} {first} {second} {first}", r"\{first\} stands 2 times"),
    ("pairwise", HEADING + "{first} {second} {question}", r"order \{question\}, \{first\}, \{second\}.*encoded once"),
    ("pairwise", HEADING + "{question} {second} {first}", r"order \{question\}, \{first\}, \{second\}"),
    ("claims", "{claim} was said to {question}", r"order \{question\}, \{claim\}"),
    ("pairwise", "---\noptions: {first: one}\n---\n{question} {first} {second}", "missing option 'second'"),
    ("pairwise", "---\noptions: {first: a, second: b, third: c}\n---\n{question} {first} {second}", "unknown option"),
    ("pairwise", "---\noptions: [a, b]\n---\n{question} {first} {second}", "options must be names with texts"),
    ("pairwise", "---\noptions: {first: a, second: ''}\n---\n{question} {first} {second}", "'second' is empty"),
    ("pairwise", "---\noptions: {first: 1, second: 12}\n---\n{question} {first} {second}", "probabilities overlap"),
    ("claims", "---\noptions: {correct: Yes, wrong: No}\n---\n{claim}", "put its text in quotes"),
    ("pointwise", "---\noptions: {low: a, 5: b}\n---\n{question} {response}", "'low' must be a rating from 0 to 100"),
    ("pointwise", "---\nscale: [1, 5]\noptions: {0: a, 5: b}\n---\n{question} {response}", "rating from 1 to 5"),
    ("pointwise", "---\nscale: [5, 1]\n---\n{question} {response}", "scale must be"),
    ("pairwise", "---\nkind: pointwise\n---\n{question} {first} {second}", "of kind 'pointwise', expected 'pairwise'"),
    ("pairwise", "---\nsystems: x\n---\n{question} {first} {second}", "unknown key 'systems'"),
    ("pairwise", "---\nsystem: [x]\n---\n{question} {first} {second}", "system must be text"),
    ("pairwise", "---\nsystem: x\n{question} {first} {second}", "no closing line"),
    ("pairwise", "---\na: b: c\n---\n{question} {first} {second}", "not YAML"),
    ("pairwise", "---\njust words\n---\n{question} {first} {second}", "must be keys and values"),
]


@pytest.mark.parametrize(("kind", "source", "message"), BAD)
def test_a_bad_prompt_is_refused_with_its_fault(kind, source, message):
    with pytest.raises(RewardError, match=message):
        parse_prompt(source, kind, where="mine.md")


def test_all_faults_of_a_file_are_told_at_once_with_its_name():
    with pytest.raises(RewardError, match=r"mine\.md.*missing option 'second'.*missing slot \{second\}.*unknown key"):
        parse_prompt("---\nsytem: x\noptions: {first: a}\n---\n{question} {first}", "pairwise", where="mine.md")


def test_the_kinds_of_prompts_are_known():
    assert set(KINDS) == {"pairwise", "pointwise", "claims", "split"}
    with pytest.raises(RewardError, match="kinds: pairwise"):
        parse_prompt("x", "listwise")
