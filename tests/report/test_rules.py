"""What is called better, worse or suspicious, from numbers written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.records import Evaluated, Evaluation, Pair, Question, Response, Samples, write_jsonl
from align.report.by_category import by_category
from align.report.changes import history
from align.report.critic_quality import Figures
from align.report.examples import MAX_PICTURES, MAX_RATIONALES, pick_examples, picture
from align.report.funnel import duration, funnels, reasons
from align.report.metrics import metric, percent, plain
from align.report.read import RoundData, RunData, Stage
from align.report.thumbnails import Pictures
from align.report.training_curves import held_out_figures
from align.report.verdict import judge
from align.report.warnings import find_warnings
from align.run.folder import Round
from reward.intervals import Interval, wilson
from reward.judgement import Judgement, Verdict
from reward.reliability import Figure


def one_round(number: int, **metrics: tuple[float, float, float]) -> RoundData:
    data = RoundData(number, Round(Path(f"nowhere/round-{number}"), number))
    data.metrics = {name: Interval(*values, 100) for name, values in metrics.items()}
    return data


def a_run(*rounds: RoundData, **config: object) -> RunData:
    return RunData("run", Path("nowhere"), config=dict(config), rounds=list(rounds))


def critic(**values: float) -> Figures:
    """Figures with these values, each over 100 comparisons."""
    return {name: Figure(value=value, count=100, questions=50) for name, value in values.items()}


def agreeing_critic(right: int, total: int) -> Figures:
    found = wilson(right, total)
    figure = Figure(value=found.mean, low=found.low, high=found.high, count=total, questions=total)
    return {"pairs_agree_with_reference": figure}


def verdict(run: RunData, critics: dict[int, Figures] | None = None):
    return judge(run, history(run), None, critics or {})


def titles(run: RunData, critics: dict[int, Figures] | None = None) -> set[str]:
    return {warning.title for warning in find_warnings(run, history(run), critics or {})}


def test_means_whose_intervals_lie_apart_are_better():
    run = a_run(one_round(0, greedy_accuracy=(0.5, 0.45, 0.55)), one_round(1, greedy_accuracy=(0.7, 0.65, 0.75)))
    moved = history(run).overall["greedy_accuracy"]
    # Half widths of 0.05 on both sides add to 0.0707.
    assert (moved.difference.low, moved.difference.high) == pytest.approx((0.2 - 0.0707, 0.2 + 0.0707), abs=1e-4)
    assert moved.state == "better"
    assert not moved.paired


def test_fewer_hallucinations_are_better_and_more_are_worse():
    before, after = (0.4, 0.35, 0.45), (0.1, 0.06, 0.14)
    down = a_run(one_round(0, hallucination=before), one_round(1, hallucination=after))
    up = a_run(one_round(0, hallucination=after), one_round(1, hallucination=before))
    assert history(down).overall["hallucination"].state == "better"
    assert history(up).overall["hallucination"].state == "worse"


def test_a_change_within_its_interval_is_neither():
    run = a_run(one_round(0, greedy_accuracy=(0.5, 0.4, 0.6)), one_round(1, greedy_accuracy=(0.52, 0.42, 0.62)))
    assert history(run).overall["greedy_accuracy"].state == "unclear"
    assert verdict(run).title.startswith("No improvement shown")


def test_length_has_no_good_direction():
    run = a_run(one_round(0, response_tokens=(5, 4, 6)), one_round(1, response_tokens=(50, 49, 51)))
    assert history(run).overall["response_tokens"].state == "neutral"


def test_a_number_without_an_interval_is_never_judged():
    run = a_run(one_round(0, win_rate_first=(0.5, 0.5, 0.5)), one_round(1, win_rate_first=(0.9, 0.9, 0.9)))
    assert history(run).overall["win_rate_first"].state == "neutral"


def test_pairing_follows_the_responses_on_disk_and_not_their_order():
    rounds = [
        one_round(number, greedy_accuracy=(mean, mean - 0.2, mean + 0.2)) for number, mean in ((0, 0.5), (1, 0.75))
    ]
    rounds[0].lines = [line(f"q{index}", right=index < 2) for index in range(4)]
    rounds[1].lines = [line(f"q{index}", right=index < 3) for index in (3, 2, 1, 0)]
    moved = history(a_run(*rounds)).overall["greedy_accuracy"]
    assert moved.paired
    # Question q2 alone moved, by one; the resampled means lie between 0 and 1.
    assert moved.difference.mean == pytest.approx(0.25)
    assert moved.difference.low == 0


def test_responses_that_do_not_give_the_published_mean_are_not_paired():
    rounds = [one_round(number, greedy_accuracy=(0.9, 0.85, 0.95)) for number in (0, 1)]
    for data in rounds:
        data.lines = [line("q0", right=False), line("q1", right=True)]
    assert not history(a_run(*rounds)).overall["greedy_accuracy"].paired


def line(id_: str, *, right: bool, task: str = "a") -> Evaluation:
    question = Question(id=id_, question="What?", answer="yes", meta={"task": task})
    return Evaluation(id=id_, question=question, greedy=Evaluated(text="yes", num_tokens=1, correct=right))


def test_a_worse_round_is_a_warning_even_when_the_last_one_is_better():
    means = ((0.4, 0.36, 0.44), (0.7, 0.66, 0.74), (0.5, 0.46, 0.54))
    run = a_run(*(one_round(number, greedy_accuracy=values) for number, values in enumerate(means)))
    found = verdict(run)
    assert found.state == "better"
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith("Round 2 is worse than round 1")


def lengthy(last_accuracy: float, last_tokens: float = 15.0) -> RunData:
    return a_run(
        one_round(0, greedy_accuracy=(0.5, 0.45, 0.55), response_tokens=(6, 5.99, 6.01)),
        one_round(
            1,
            greedy_accuracy=(last_accuracy, last_accuracy - 0.05, last_accuracy + 0.05),
            response_tokens=(last_tokens, last_tokens - 0.01, last_tokens + 0.01),
        ),
    )


LOVES_LENGTH = {1: critic(length_correlation=0.8, chosen_longer=0.95)}


def test_a_critic_that_loves_length_is_said_to_have_taught_length():
    found = verdict(lengthy(0.5), LOVES_LENGTH)
    assert found.title.endswith("; what it learned is length.")
    (text,) = found.diagnoses
    assert text.startswith("What was learned is length: 6.00 tokens per response became 15.0 (+150\u00a0%)")
    assert "correlation 0.800" in text
    assert "the longer response was chosen in 95.0\u00a0% of the pairs of unequal length" in text
    assert "Responses became longer" in titles(lengthy(0.5), LOVES_LENGTH)
    assert "The critic likes longer responses" in titles(lengthy(0.5), LOVES_LENGTH)


def test_length_is_only_part_of_it_when_the_model_became_better():
    found = verdict(lengthy(0.9), LOVES_LENGTH)
    assert found.state == "better"
    assert found.title.endswith("; part of it is length.")
    assert found.diagnoses[0].startswith("Part of what was learned")


@pytest.mark.parametrize(("tokens", "taught"), [(6.8, True), (6.2, False)])
def test_a_small_drift_is_length_learned_only_where_nothing_else_was(tokens, taught):
    # From 6 tokens: 13 % is a drift for a run that did not improve (a twentieth), 3 % is none.
    run, better = lengthy(0.5, tokens), lengthy(0.9, tokens)
    assert bool(verdict(run, LOVES_LENGTH).diagnoses) is taught
    assert verdict(better, LOVES_LENGTH).diagnoses == []


def test_longer_responses_are_not_blamed_on_a_critic_that_ignores_or_dislikes_length():
    for correlation in (0.05, -0.8):
        assert verdict(lengthy(0.5), {1: critic(length_correlation=correlation)}).diagnoses == []


def test_a_critic_that_likes_length_in_one_round_and_brevity_in_the_next_taught_neither():
    likes, dislikes = (critic(length_correlation=value) for value in (0.9, -0.4))
    assert verdict(lengthy(0.5), {1: likes, 2: dislikes}).diagnoses == []
    assert verdict(lengthy(0.5), {1: likes, 2: likes}).diagnoses != []


def test_responses_that_became_shorter_are_laid_on_a_critic_that_loves_brevity():
    brief = {1: critic(length_correlation=-0.8, chosen_longer=0.1)}
    (text,) = verdict(lengthy(0.5, 3.0), brief).diagnoses
    assert "6.00 tokens per response became 3.00 (\u221250\u00a0%)" in text
    assert "the shorter response was chosen in 90.0\u00a0%" in text


def agreeing(*rounds: tuple[int, int]) -> dict[int, Figures]:
    """(right, all) of the pairs that set a right response against a wrong one, by round."""
    return {number: agreeing_critic(right, total) for number, (right, total) in enumerate(rounds, start=1)}


def unmoved() -> RunData:
    return a_run(one_round(0, greedy_accuracy=(0.5, 0.45, 0.55)), one_round(1, greedy_accuracy=(0.5, 0.45, 0.55)))


def test_preferences_no_better_than_random_are_called_so():
    found = verdict(unmoved(), agreeing((52, 100), (49, 100)))
    assert found.title.endswith("; its preferences were no better than random.")
    (text,) = found.diagnoses
    # 101 of 200; Wilson: (0.505 + 0.0096) / 1.0192 -+ 0.0686, by hand.
    assert "in 50\u00a0% of 200 pairs (44\u00a0% to 57\u00a0%; random preferences give 50\u00a0%)" in text


def test_a_run_that_rose_on_random_preferences_says_so_in_its_first_sentence():
    found = verdict(lengthy(0.9), agreeing((100, 200)))
    assert found.title.startswith("Better")
    assert found.title.endswith("; its preferences were no better than random.")


@pytest.mark.parametrize(
    ("right", "short"),
    [(60, "wrong more often than right"), (112, "no better than"), (116, "hardly better"), (150, None)],
)
def test_how_preferences_agree_with_reference_answers_has_four_grades(right, short):
    diagnoses = verdict(unmoved(), agreeing((right, 200))).title
    assert (
        short in diagnoses if short else diagnoses.startswith("No improvement shown") and "preferences" not in diagnoses
    )


def test_few_pairs_say_nothing_about_preferences():
    assert verdict(unmoved(), agreeing((5, 10))).diagnoses == []


def test_without_reference_answers_training_tells_whether_there_was_anything_to_learn():
    def trained(accuracy: float) -> RunData:
        data = after_training(0.1, 0.2, accuracy)
        data.metrics = {"greedy_accuracy": Interval(0.5, 0.45, 0.55, 100)}
        return a_run(one_round(0, greedy_accuracy=(0.5, 0.45, 0.55)), data)

    assert verdict(trained(0.51)).title.endswith("; training learned hardly anything from its pairs.")
    assert verdict(trained(0.9)).diagnoses == []


def test_lengths_alone_leave_open_whether_it_improved_but_not_what_was_learned():
    run = a_run(one_round(0, response_tokens=(6, 5.8, 6.2)), one_round(1, response_tokens=(15, 14, 16)))
    found = verdict(run, LOVES_LENGTH)
    assert found.title == "It is not known whether the model improved."
    assert found.diagnoses[0].startswith("What was learned is length")


def with_wins(*rates: dict[str, tuple[float, float, float]]) -> RunData:
    """Rounds 1, 2, ... with these win rates; the first policy has none."""
    return a_run(one_round(0), *(one_round(number, **rate) for number, rate in enumerate(rates, start=1)))


def test_a_win_rate_is_held_against_one_half_and_not_against_the_round_before_s():
    run = with_wins(
        {"win_rate_parent": (0.8, 0.75, 0.85)},
        {"win_rate_parent": (0.6, 0.55, 0.65)},
        {"win_rate_parent": (0.4, 0.35, 0.45)},
    )
    states = [(step.first_round, step.last_round, step.state) for step in history(run).steps["win_rate_parent"]]
    assert states == [(0, 1, "better"), (1, 2, "better"), (2, 3, "worse")]
    assert "win_rate_parent" not in history(run).overall
    (warning,) = [
        warning for warning in find_warnings(run, history(run), {}) if "wins against the round before" in warning.title
    ]
    assert [number for number, _ in warning.findings] == [3]
    assert warning.serious


@pytest.mark.parametrize(
    ("rate", "title", "state"),
    [
        ((0.7, 0.65, 0.75), "Better: it wins 70.0\u00a0% against the first policy.", "better"),
        ((0.5, 0.45, 0.55), "No improvement shown: it wins 50.0\u00a0% against the first policy.", "unclear"),
        ((0.3, 0.25, 0.35), "Worse: it wins 30.0\u00a0% against the first policy.", "worse"),
    ],
)
def test_without_reference_answers_the_critic_s_comparisons_give_the_verdict_after_one_round(rate, title, state):
    found = verdict(with_wins({"win_rate_initial": rate}))
    assert (found.title, found.state) == (title, state)
    show = metric("win_rate_initial").show
    assert f"interval is {show(rate[1])} to {show(rate[2])}" in found.detail


def test_responses_that_had_nothing_to_be_compared_with_are_no_failure_of_the_critic():
    alike = "no other response to compare with"
    assert "The critic could not score much" not in titles(a_run(scored(unscored={alike: 200})))
    assert "The critic could not score much" in titles(a_run(scored(unscored={alike: 200, "timeout": 60})))


def after_training(chosen: float, margin: float, accuracy: float) -> RoundData:
    data = one_round(1)
    data.log = [{"step": 1.0, "rewards/chosen": 0.0, "rewards/margins": 0.0, "rewards/accuracies": 0.5}]
    data.log += [{"step": 2.0, "rewards/chosen": chosen, "rewards/margins": margin, "rewards/accuracies": accuracy}]
    return data


def test_a_chosen_reward_that_falls_with_the_rejected_one_is_an_warning():
    assert "The chosen reward fell" in titles(a_run(after_training(-2.0, 4.0, 0.9)))
    # The published Valley2-DPO training ends here: a fall, but a fifth of the margin only.
    assert "The chosen reward fell" not in titles(a_run(after_training(-0.93, 4.90, 0.92)))


def test_pairs_that_teach_nothing_are_an_warning():
    assert "The pairs taught hardly anything" in titles(a_run(after_training(0.0, 0.01, 0.52)))
    assert "The pairs taught hardly anything" not in titles(a_run(after_training(0.0, 1.0, 0.8)))


def scored(**counts: object) -> RoundData:
    data = one_round(1)
    data.stages["sample"] = Stage(
        "sample", "complete", counts={"questions": 100, "responses": 400, "truncated": counts.pop("truncated", 0)}
    )
    data.stages["score"] = Stage("score", "complete", counts=dict(counts))
    return data


def test_losses_beyond_a_twentieth_are_warnings():
    assert "Many responses were cut off" in titles(a_run(scored(truncated=21)))
    assert "Many responses were cut off" not in titles(a_run(scored(truncated=20)))
    assert "The critic could not score much" in titles(a_run(scored(unscored={"timeout": 15, "nonsense": 6})))
    assert "The critic could not score much" not in titles(a_run(scored(unscored={"timeout": 20})))


def test_few_pairs_are_an_warning():
    assert "Few questions gave a pair" in titles(a_run(scored(pairs=19)))
    assert "Few questions gave a pair" not in titles(a_run(scored(pairs=20)))


@pytest.mark.parametrize(
    ("figures", "title"),
    [
        ({"consistency": 0.69}, "The critic contradicts itself"),
        ({"position_bias": 0.2}, "The critic prefers the response shown first"),
        ({"position_bias": -0.2}, "The critic prefers the response shown second"),
        ({"length_correlation": -0.4}, "The critic likes shorter responses"),
    ],
)
def test_figures_beyond_their_limits_are_warnings(figures, title):
    run = a_run(one_round(1))
    assert titles(run, {1: critic(**figures)}) == {title}
    assert titles(run, {1: critic(consistency=0.9, position_bias=0.02, length_correlation=0.1)}) == set()


def test_a_critic_that_chooses_wrong_answers_is_a_warning_once_enough_pairs_say_so():
    run = a_run(one_round(1))
    title = "The critic does not know the right answers"
    assert title in titles(run, {1: agreeing_critic(50, 100)})
    assert title not in titles(run, {1: agreeing_critic(5, 10)})
    assert title not in titles(run, {1: agreeing_critic(90, 100)})


def test_the_plain_path_is_a_warning_unless_it_was_asked_for():
    data = one_round(1)
    data.stages["sample"] = Stage("sample", "complete", notes={"shared_prefix": "not used: sliding windows"})
    assert "The shared prefix was not used" in titles(a_run(data))
    assert "The shared prefix was not used" not in titles(a_run(data, shared_prefix="off"))
    data.stages["sample"] = Stage("sample", "complete", notes={"shared_prefix": "exact, max error 1e-6"})
    assert "The shared prefix was not used" not in titles(a_run(data))


def test_warnings_of_several_rounds_stand_under_one_title():
    run = a_run(one_round(1), one_round(2))
    found = find_warnings(run, history(run), {1: critic(consistency=0.6), 2: critic(consistency=0.4)})
    assert len(found) == 1
    assert [number for number, _ in found[0].findings] == [1, 2]
    assert found[0].serious


def test_funnels_name_every_loss():
    data = scored(
        scored=390, unscored={"timeout": 10}, pairs=70, dropped_responses={"same text": 30, "unscored": 10},
        questions_without_pair={"all rewards tied": 30},
    )  # fmt: skip
    data.stages["dpo"] = Stage("dpo", "complete", counts={"pairs": 68, "dropped_too_long": 2})
    (funnel,) = funnels(a_run(data))
    steps = {
        step.label: (step.count, step.share, [(loss.reason, loss.count) for loss in step.losses])
        for step in funnel.steps
    }
    assert steps["responses scored"] == (390, 390 / 400, [("timeout", 10)])
    assert steps["responses fit for a pair"] == (360, 360 / 390, [("same text", 30)])
    assert steps["questions with a pair"] == (70, 0.7, [("all rewards tied", 30)])
    assert steps["pairs trained on"] == (68, 68 / 70, [("too long", 2)])


def test_further_responses_are_said_where_the_responses_are():
    data = scored()
    data.stages["sample"] = Stage("sample", "complete", counts={"responses": 420, "further_responses": 20})
    labels = [step.label for step in funnels(a_run(data))[0].steps]
    assert "responses sampled, 20 of them to questions without two different" in labels


def test_reasons_come_largest_first():
    assert [loss.reason for loss in reasons({"a": 1, "b": 3, "c": 0, "d": "x"})] == ["b", "a"]
    assert reasons(None) == []
    assert [loss.count for loss in reasons(4)] == [4]


def test_places_compare_the_same_questions_by_task():
    rounds = [one_round(0), one_round(1)]
    rounds[0].lines = [line("q0", right=False, task="count"), line("q1", right=True, task="colour")]
    rounds[1].lines = [
        line("q1", right=True, task="colour"),
        line("q0", right=True, task="count"),
        line("q2", right=True),
    ]
    found = by_category(a_run(*rounds))
    assert found is not None
    assert (found.column, found.which) == ("task", "greedy")
    assert [(category.name, category.first.mean, category.last.mean) for category in found.categories] == [
        ("count", 0, 1),
        ("colour", 1, 1),
    ]


def test_one_group_alone_is_no_place():
    rounds = [one_round(0), one_round(1)]
    for data in rounds:
        data.lines = [line("q0", right=True), line("q1", right=False)]
    assert by_category(a_run(*rounds)) is None


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("greedy_accuracy", 0.2, "+20.0"),
        ("greedy_accuracy", -0.0312, "\u22123.1"),
        ("greedy_accuracy", 0.00001, "±0.0"),
        ("response_tokens", -0.004, "±0.00"),
        ("response_tokens", 12.345, "+12.3"),
    ],
)
def test_changes_carry_their_sign(name, value, text):
    assert metric(name).show_change(value) == text


def test_numbers_read_well():
    assert percent(0.54321) == "54.3\u00a0%"
    assert [plain(value) for value in (0.1234, 1.234, 12.34, 1234.5, -0.5)] == [
        "0.123",
        "1.23",
        "12.3",
        "1,234",
        "\u22120.500",
    ]
    assert [duration(seconds) for seconds in (0, 59.6, 60, 3599.7, 86400)] == [
        "0.0 s",
        "1 min 0 s",
        "1 min 0 s",
        "1 h 0 min",
        "24 h 0 min",
    ]


def test_many_rationales_and_frames_are_cut_and_counted(tmp_path):
    data = RoundData(1, Round(tmp_path, 1))
    question = Question(id="q", question="What?", images=[f"{frame}.png" for frame in range(40)])
    responses = [Response(text=str(index), num_tokens=1) for index in range(10)]
    verdicts = [
        Verdict(first=one, second=two, p_first=0.9, p_second=0.1, winner=one, rationale="so")
        for one in range(10)
        for two in range(10)
        if one != two
    ]
    write_jsonl(data.folder.samples, [Samples(id="q", question=question, responses=responses, seed=0)])
    write_jsonl(data.folder.scores, [Judgement(id="q", rewards=[0.0] * 10, verdicts=verdicts)])
    pictures = Pictures(None)
    examples = pick_examples(
        a_run(data), question_images=lambda data: pictures, evaluation_images=pictures, max_held_out=1, max_training=1
    )
    (item,) = examples.training
    assert (len(item.rationales), item.num_rationales) == (MAX_RATIONALES, 90)
    assert (len(item.pictures.shown), item.pictures.about) == (MAX_PICTURES, "6 of 40 images")
    assert item.table == []


def test_of_a_video_frames_from_first_to_last_are_shown():
    frames = [f"clip/{frame:02}.jpg#frame" for frame in range(16)]
    question = Question(id="q", question="What happens?", images=frames, meta={"video": "clip"})
    shown = picture(question, Pictures(None))
    assert [item.reference for item in shown.shown] == [frames[index] for index in (0, 3, 6, 9, 12, 15)]
    assert shown.about == "6 of 16 frames of clip"
    few = picture(question.model_copy(update={"images": frames[:3], "meta": {}}), Pictures(None))
    assert (len(few.shown), few.about) == (3, "3 frames")


def write_scored(folder: Path, lines: list[tuple[str | None, list[tuple[str, int, float]]]]) -> RoundData:
    """A round of questions with these answers, each with responses as (text, tokens, reward)."""
    data = RoundData(1, Round(folder, 1))
    samples, scores = [], []
    for index, (answer, responses) in enumerate(lines):
        question = {"id": f"q{index}", "question": "How many?", "answer": answer, "answer_kind": "number"}
        said = [{"text": text, "num_tokens": tokens} for text, tokens, _ in responses]
        samples.append({"id": f"q{index}", "question": question, "responses": said, "seed": 0})
        scores.append({"id": f"q{index}", "rewards": [reward for _, _, reward in responses]})
    data.folder.samples.write_text("".join(json.dumps(line) + "\n" for line in samples))
    data.folder.scores.write_text("".join(json.dumps(line) + "\n" for line in scores))
    return data


def test_of_many_responses_chosen_and_rejected_come_first_and_keep_their_letters(tmp_path):
    data = write_scored(tmp_path, [(None, [(f"text {index}", 1, float(index % 7)) for index in range(20)])])
    sides = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in ("text 6", "text 0")]
    prompt = [{"role": "user", "content": [{"type": "text", "text": "How many?"}]}]
    pair = Pair(
        id="q0/6-0", images=[], prompt=prompt, chosen=sides[0], rejected=sides[1], margin=6.0, question_id="q0",
        responses={"chosen": 6, "rejected": 0},
    )  # fmt: skip
    write_jsonl(data.folder.pairs, [pair])
    examples = pick_examples(
        a_run(data),
        question_images=lambda data: Pictures(None),
        evaluation_images=Pictures(None),
        max_held_out=1,
        max_training=1,
    )
    (item,) = examples.training
    first, second, *rest = item.candidates
    assert [(first.letter, first.role), (second.letter, second.role)] == [("G", "chosen"), ("A", "rejected")]
    rewards = [candidate.reward for candidate in rest]
    assert rewards == sorted(rewards, reverse=True)
    assert {candidate.letter: candidate.text for candidate in item.candidates}["T"] == "text 19"


def test_a_run_with_rounds_to_come_is_better_only_so_far():
    rounds = one_round(0, greedy_accuracy=(0.5, 0.45, 0.55)), one_round(1, greedy_accuracy=(0.7, 0.65, 0.75))
    found = verdict(a_run(*rounds, rounds=3))
    assert found.title.startswith("Better so far: right answers rose")
    assert found.detail.endswith("Of 3 rounds 1 is evaluated.")
    assert verdict(a_run(*rounds, rounds=1)).title.startswith("Better: ")


def test_a_stage_that_refused_says_why():
    data = one_round(1)
    data.stages["pairs"] = Stage("pairs", "running", refused="no pair is left of 4 questions: tie (4)")
    (warning,) = find_warnings(a_run(data), history(a_run(data)), {})
    assert (warning.title, warning.serious) == ("Refused", True)
    assert warning.findings == [(1, "pairs: no pair is left of 4 questions: tie (4)")]


def less_looking(*, right_after):
    before, after = (
        one_round(0, sampled_accuracy=(0.4, 0.35, 0.45), image_dependence=(0.8, 0.7, 0.9)),
        one_round(1, sampled_accuracy=right_after, image_dependence=(0.4, 0.3, 0.5)),
    )
    after.metrics["image_dependence_change"] = Interval(-0.4, -0.5, -0.3, 100)
    return a_run(before, after)


def test_a_round_that_got_better_by_looking_less_says_so_first_and_among_the_warnings():
    run = less_looking(right_after=(0.7, 0.65, 0.75))
    (said,) = verdict(run).warnings
    assert said.startswith("Round 1 got better by looking less: answers that change with the picture −40.0 points")
    (warned,) = [found for found in find_warnings(run, history(run), {}) if found.title.startswith("Looks at the")]
    assert warned.serious
    assert "better by looking less" in warned.findings[0][1]


def test_a_round_that_looks_less_and_is_no_better_is_a_warning_and_few_questions_are_none():
    run = less_looking(right_after=(0.41, 0.36, 0.46))
    (warned,) = [found for found in find_warnings(run, history(run), {}) if found.title.startswith("Looks at the")]
    assert not warned.serious
    run.rounds[1].metrics["image_dependence_change"] = Interval(-0.4, -0.5, -0.3, 10)
    assert not any(title.startswith("Looks at the") for title in titles(run))


def test_changes_that_are_said_in_words_have_no_curve():
    run = less_looking(right_after=(0.7, 0.65, 0.75))
    assert "image_dependence" in history(run).overall
    assert "image_dependence_change" not in history(run).overall
    assert not [one for one in held_out_figures(run, history(run), None) if one.metric.name.endswith("_change")]
