import json

import pytest
from PIL import Image

from align.config import load_config
from align.demo import write_demo
from align.demo.data import CRITIC_PROMPT
from align.demo.questions import TASKS
from align.records import read_questions
from reward.prompt import load_prompt

pytest.importorskip("sklearn")


def test_the_demo_writes_all_that_a_run_needs(tmp_path):
    write_demo(tmp_path, num_questions=10, num_eval=5, seed=1)
    config = load_config(tmp_path / "align.yaml")
    questions, held_out = read_questions(config.questions), read_questions(config.evaluate.questions)
    assert (len(questions), len(held_out)) == (10, 5)
    for question in questions + held_out:
        (image,) = question.images
        assert Image.open(tmp_path / image).size == (112, 112)
        assert question.answer
    assert not {q.images[0] for q in questions} & {q.images[0] for q in held_out}
    assert config.seed == 1


def test_equal_seeds_write_equal_data_and_held_out_questions_never_change(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 5)):
        write_demo(tmp_path / name, num_questions=5, num_eval=5, seed=seed)

    def content(name: str, file: str) -> bytes:
        return (tmp_path / name / file).read_bytes()

    for file in ("questions.jsonl", "eval.jsonl", "images/policy/00003.png", "images/eval/00002.png"):
        assert content("a", file) == content("b", file)
    assert content("a", "questions.jsonl") != content("c", "questions.jsonl")
    assert content("a", "eval.jsonl") == content("c", "eval.jsonl")


def test_records_carry_what_the_rule_needs(tmp_path):
    write_demo(tmp_path, num_questions=5, num_eval=1, seed=0)
    lines = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert [line["meta"]["task"] for line in lines] == list(TASKS)
    for line in lines:
        assert not {str(digit) for digit in line["meta"]["digits"]} & set(line["absent_objects"])


def test_the_critic_prompt_offers_two_verdicts():
    prompt = load_prompt(CRITIC_PROMPT, "pairwise")
    assert prompt.options == {"first": "first", "second": "second"}
