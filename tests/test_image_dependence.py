"""Does the policy look? Answers and their log-probabilities with a blank picture and another one; gates and warnings on them."""

import json

import pytest
import torch
from PIL import Image
from transformers import LlavaOnevisionForConditionalGeneration

from align.config import load_config
from align.errors import UserError
from align.evaluation.against_parent import looks_less_than_parent, worse_than_parent
from align.evaluation.evaluate import run_evaluate
from align.evaluation.gates import check_gate_names, check_gates
from align.evaluation.image_dependence import looked, measure_looking
from align.evaluation.measure import Answers
from align.evaluation.summary import EvaluationSummary
from align.loop import warnings_of
from align.records import Evaluated, Evaluation, OtherImageAnswer, Question, ResponseLogProbs, read_jsonl, write_jsonl
from align.run.folder import RunDir
from reward.intervals import Interval
from tests.critic_runs import config_of, save_blind, save_seeing, write_round
from tests.tiny_models import llava_onevision_processor

NUM_QUESTIONS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy that sees, one that does not, and held-out questions."""
    folder = tmp_path_factory.mktemp("image-dependence")
    write_round(folder, answers=True, num_questions=NUM_QUESTIONS)
    (folder / "questions.jsonl").rename(folder / "held-out.jsonl")
    (folder / "questions.jsonl").write_text('{"id": "t", "question": "What?"}\n')
    save_seeing(folder / "seeing")
    save_blind(folder / "blind")
    return folder


def evaluated(folder, policy, name="run", **settings):
    evaluate = {"questions": "held-out.jsonl", "max_new_tokens": 4} | settings
    config = config_of(folder, policy=f"./{policy}", name=f"{policy}-{name}", evaluate=evaluate)
    run_evaluate(config, 0)
    this = RunDir(config.run_dir).round(0)
    return this, json.loads(this.evaluation.read_text())["metrics"]


def test_a_policy_that_sees_depends_on_the_picture_and_a_blind_one_does_not(folder):
    this, seeing = evaluated(folder, "seeing")
    assert seeing["image_dependence_blank"]["count"] == NUM_QUESTIONS
    assert seeing["image_dependence"]["mean"] > 0
    assert seeing["image_log_ratio"]["mean"] > 0
    assert seeing["image_dependence"] == min(
        (seeing[f"image_dependence_{name}"] for name in ("blank", "shuffled")), key=lambda found: found["mean"]
    )
    assert {"other-image-answers.jsonl", "log-probs-images.jsonl"} <= this.manifest.stage("evaluate").outputs.keys()
    _, blind = evaluated(folder, "blind")
    for name in ("image_dependence", "image_dependence_blank", "image_dependence_shuffled"):
        assert blind[name]["mean"] == 0
        assert 0 < blind[name]["high"] < 1
    assert blind["image_log_ratio_shuffled"]["mean"] == pytest.approx(0, abs=1e-5)


def test_log_ratios_are_those_of_stock_transformers_with_the_picture_and_without(folder):
    this, metrics = evaluated(folder, "seeing")
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder / "seeing", dtype=torch.float32).eval()
    processor = llava_onevision_processor()

    def log_prob(line, picture):
        text = processor.apply_chat_template(line.question.messages(), add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], images=[[picture]], return_tensors="pt")
        ids = torch.cat([inputs["input_ids"], torch.tensor([line.greedy.token_ids])], dim=1)
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0]
        start = inputs["input_ids"].shape[1]
        log_p = logits.double().log_softmax(dim=-1)
        return sum(float(log_p[start - 1 + i, token]) for i, token in enumerate(line.greedy.token_ids))

    ratios = []
    for line in read_jsonl(this.evaluation_lines, Evaluation):
        picture = Image.open(folder / line.question.images[0]).convert("RGB")
        nats = log_prob(line, picture) - log_prob(line, Image.new("RGB", picture.size, (127, 127, 127)))
        ratios.append(nats / len(line.greedy.token_ids))
    assert metrics["image_log_ratio_blank"]["mean"] == pytest.approx(sum(ratios) / NUM_QUESTIONS, abs=1e-4)


def test_what_was_killed_ends_as_what_was_not(folder):
    this, whole = evaluated(folder, "seeing", name="killed")
    manifest = json.loads(this.manifest_path.read_text())
    del manifest["checksum"]
    manifest["stages"]["evaluate"]["status"] = "running"
    this.manifest_path.write_text(json.dumps(manifest))
    for path, kept in ((this.evaluation_lines, 6), (this.other_image_answers, 5), (this.image_log_probs, 7)):
        lines = path.read_text().splitlines(keepends=True)
        path.with_name(f"{path.stem}.part-0.jsonl").write_text("".join(lines[:kept]) + '{"id": "bla')
        path.unlink()
    this.evaluation.unlink()
    assert evaluated(folder, "seeing", name="killed")[1] == whole


def test_switched_off_it_asks_nothing_again(folder):
    this, metrics = evaluated(folder, "seeing", name="off", image_dependence=0)
    assert not [name for name in metrics if name.startswith("image_")]
    assert not this.other_image_answers.exists()
    assert all(not line.greedy.token_ids for line in read_jsonl(this.evaluation_lines, Evaluation))


def line(number, *, right=True):
    question = Question(id=f"q{number}", question="What?", images=["a.png"], answer="cup")
    answer = Evaluated(text="A cup." if right else "A mug.", num_tokens=4, correct=right)
    return Evaluation(id=f"q{number}", question=question, greedy=answer, sampled=[answer])


def again(control, number, text, nats=None):
    answer = Evaluated(text=text, num_tokens=4, correct="cup" in text)
    weighed = [] if nats is None else [ResponseLogProbs(id=f"{control}:q{number}", log_probs=[nats], num_tokens=[4])]
    return OtherImageAnswer(id=f"{control}:q{number}", answer=answer), weighed


def test_the_table_made_by_hand():
    lines = [line(number) for number in range(4)]
    # Blank: two of four answers change (case and the full stop do not count); shuffled: all three that were asked.
    asked = [
        again("blank", 0, "a cup", -5.0), again("blank", 1, "A dog.", -9.0), again("blank", 2, "A cup.", -1.0),
        again("blank", 3, "No.", float("-inf")),
        again("shuffled", 0, "A dog.", -9.0), again("shuffled", 1, "A cat.", -5.0), again("shuffled", 2, "Two.", -1.0),
    ]  # fmt: skip
    real = [ResponseLogProbs(id=f"real:q{number}", log_probs=[-1.0], num_tokens=[4]) for number in range(4)]
    found = measure_looking(
        looked(lines, [answer for answer, _ in asked], real + [one for _, weighed in asked for one in weighed])
    )
    assert (found["image_dependence_blank"].mean, found["image_dependence_blank"].count) == (0.5, 4)
    assert (found["image_dependence_shuffled"].mean, found["image_dependence_shuffled"].count) == (1.0, 3)
    assert found["image_dependence"] == found["image_dependence_blank"]
    # (1 + 2 + 0) / 3 nats per token of the three that can be weighed; (2 + 1 + 0) / 3.
    assert found["image_log_ratio_blank"].mean == pytest.approx(1.0)
    assert found["image_log_ratio"].count == 3
    assert found["greedy_accuracy_blank"].mean == 0.5
    assert found["greedy_accuracy_shuffled"].mean == 0.0


def two_rounds(path, *, right, changes):
    """Two evaluated rounds of 40 questions: per round how many were right and how many changed with the picture."""
    run = RunDir(path)
    for number, (num_right, num_changed) in enumerate(zip(right, changes, strict=True)):
        this = run.round(number)
        this.path.mkdir(parents=True)
        lines = [line(index, right=index < num_right) for index in range(40)]
        write_jsonl(this.evaluation_lines, lines)
        answers = [
            again(control, index, "Other." if index < num_changed else one.greedy.text)[0]
            for control in ("blank", "shuffled")
            for index, one in enumerate(lines)
        ]
        write_jsonl(this.other_image_answers, answers)
        metrics = Answers.of(run, number).metrics({one.id for one in lines})
        EvaluationSummary(round=number, questions=40, metrics=metrics).write(this.evaluation)
    return run


def test_a_round_that_got_better_by_looking_less_says_so(tmp_path):
    run = two_rounds(tmp_path / "better", right=(10, 30), changes=(36, 8))
    said = looks_less_than_parent(run, 1)
    assert said.startswith(
        "round 1 looks at the picture less than the first policy: answers that change with the picture"
    )
    assert "-70.0 points" in said
    assert said.endswith("it got better by looking less")
    assert worse_than_parent(run, 1) is None
    run = two_rounds(tmp_path / "same", right=(10, 10), changes=(36, 8))
    assert "better" not in looks_less_than_parent(run, 1)
    run = two_rounds(tmp_path / "more", right=(10, 30), changes=(20, 36))
    assert looks_less_than_parent(run, 1) is None


def test_the_loop_hears_of_it_and_does_not_stop_for_it(tmp_path):
    config_of(tmp_path, run_root=str(tmp_path), evaluate={"questions": "held-out.jsonl"})
    two_rounds(tmp_path / "run", right=(10, 30), changes=(36, 8))
    found = warnings_of(load_config(tmp_path / "align.yaml"), 1)
    assert found.worse is None
    assert "looking less" in found.texts[0]


def test_gates_end_a_round_that_does_not_look_and_never_the_first_policy(tmp_path):
    run = two_rounds(tmp_path, right=(10, 30), changes=(36, 8))
    check_gates(run.round(1), {"min_image_dependence": 0.1})
    with pytest.raises(UserError, match=r"round 1 does not pass.*image_dependence is 0.2 .*at least 0.5"):
        check_gates(run.round(1), {"min_image_dependence": 0.5})
    with pytest.raises(UserError, match=r"image_dependence_change is -0.7"):
        check_gates(run.round(1), {"min_image_dependence_change": -0.1})
    with pytest.raises(UserError, match="could not be measured"):
        check_gates(run.round(1), {"min_image_log_ratio": 0.1})
    check_gates(run.round(0), {"min_image_dependence": 0.99})
    with pytest.raises(UserError, match=r"did you mean min_image_dependence"):
        check_gate_names({"min_image_dependance": 0.1})


def test_an_evaluated_round_is_held_against_new_gates_without_being_evaluated_again(folder):
    this, _ = evaluated(folder, "seeing", name="gates")
    before = this.evaluation_lines.stat().st_mtime_ns
    evaluated(folder, "seeing", name="gates", gates={"min_image_dependence": 1.0})
    assert this.evaluation_lines.stat().st_mtime_ns == before


def test_few_questions_say_nothing_of_looking_less(tmp_path):
    run = RunDir(tmp_path)
    for number in (0, 1):
        run.round(number).path.mkdir()
        write_jsonl(run.round(number).evaluation_lines, [line(index) for index in range(5)])
    metrics = {"image_dependence_change": Interval(-0.5, -0.9, -0.1, 5)}
    EvaluationSummary(round=1, questions=5, metrics=metrics).write(run.round(1).evaluation)
    assert looks_less_than_parent(run, 1) is None
