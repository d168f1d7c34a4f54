"""People compare responses: which, in what order and on which side; what is written down; what it says of the critic."""

import json
import threading

import pytest

from align.errors import UserError
from align.label.comparisons import draw_comparisons, sides
from align.label.session import Labelling
from align.records import Pair, Question, Response, Samples, write_jsonl
from align.report.critic_quality import critic_figures
from align.report.read import read_run
from align.run.folder import RunDir
from align.run.ratings import current_ratings, people_figures
from align.stages.critic_metrics import check_gates
from reward.critics.ratings import RatingsCritic
from reward.human_ratings import HumanRating, read_ratings
from reward.judgement import Item, Judgement

NUM_QUESTIONS = 40


@pytest.fixture
def run(tmp_path):
    """A sampled and scored round: of each question's three responses the critic likes the first most."""
    run = RunDir(tmp_path / "run")
    this = run.round(1)
    this.path.mkdir(parents=True)
    samples, scores, pairs = [], [], []
    for number in range(NUM_QUESTIONS):
        question = Question(id=f"q{number}", question="What?", images=[f"{number}.png"])
        texts = [f"A cup, {number}.", f"A mug, {number}.", f"a CUP {number}"]
        responses = [Response(text=text, num_tokens=3) for text in texts]
        samples.append(Samples(id=question.id, question=question, responses=responses, seed=0))
        scores.append(Judgement(id=question.id, rewards=[1.0, 0.0, 0.5]))
        sides_ = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in texts[:2]]
        pairs.append(
            Pair(
                id=f"{question.id}/r1/0-1", prompt=question.messages(), chosen=sides_[0], rejected=sides_[1],
                question_id=question.id, responses={"chosen": 0, "rejected": 1},
            )
        )  # fmt: skip
    write_jsonl(this.samples, samples)
    write_jsonl(this.scores, scores)
    write_jsonl(this.pairs, pairs)
    for stage, path in (("sample", this.samples), ("score", this.scores), ("pairs", this.pairs)):
        this.manifest.begin(stage, settings={}, inputs={})
        this.manifest.finish(stage, outputs=[path], counts={})
    return run


def forget_pairs(this):
    this.manifest.forget(["pairs"])


def test_the_pairs_of_the_round_are_compared_and_before_there_are_any_two_different_responses(run):
    this = run.round(1)
    drawn = draw_comparisons(this, number=1000, seed=0)
    assert len(drawn) == NUM_QUESTIONS
    assert {one.responses for one in drawn} == {(0, 1)}
    forget_pairs(this)
    drawn = draw_comparisons(this, number=1000, seed=0)
    # The first and the third say the same.
    assert {one.responses for one in drawn} == {(0, 1)}


def test_order_and_sides_are_drawn_by_the_seed_and_sides_by_the_person_too(run):
    this = run.round(1)
    one, again, other = (draw_comparisons(this, number=30, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert [comparison.id for comparison in one] != [comparison.id for comparison in other]
    assert [comparison.id for comparison in one] != sorted(comparison.id for comparison in one)
    left = {name: [sides(comparison, name, 0) for comparison in one] for name in ("anna", "ben")}
    assert left["anna"] != left["ben"]
    assert left["anna"] == [sides(comparison, "anna", 0) for comparison in again]
    assert 5 < left["anna"].count((0, 1)) < 25


def test_a_rating_is_in_the_file_at_once_and_the_same_command_resumes(run):
    this = run.round(1)
    comparisons = draw_comparisons(this, number=5, seed=0)
    session = Labelling(comparisons, this.ratings)
    first = session.next_for("anna")
    session.rate("anna", first, (1, 0), 0)
    assert json.loads(this.ratings.read_text()) == {
        "question_id": first.question.id,
        "responses": [1, 0],
        "preferred": 1,
        "annotator": "anna",
        "texts": [first.texts[1], first.texts[0]],
    }
    with this.ratings.open("a") as file:
        file.write('{"question_id": "q1", "resp')
    resumed = Labelling(comparisons, this.ratings)
    assert resumed.num_done("anna") == 1
    assert resumed.next_for("anna") == comparisons[1]
    assert resumed.next_for("ben") == comparisons[0]
    resumed.rate("ben", comparisons[0], (0, 1), None)
    assert [rating.preferred for rating in read_ratings(this.ratings)] == [1, None]


def test_a_comparison_is_made_again_and_the_last_answer_counts(run):
    this = run.round(1)
    session = Labelling(draw_comparisons(this, number=5, seed=0), this.ratings)
    first = session.next_for("anna")
    session.rate("anna", first, (0, 1), 0)
    assert session.last_of("anna") == first
    session.rate("anna", first, (0, 1), 1)
    assert session.num_done("anna") == 1
    (rating,) = current_ratings(this)
    assert rating.preferred == 1


def test_people_who_label_at_the_same_time_lose_nothing(run):
    this = run.round(1)
    comparisons = draw_comparisons(this, number=30, seed=0)
    session = Labelling(comparisons, this.ratings)

    def label(name):
        while (one := session.next_for(name)) is not None:
            session.rate(name, one, (0, 1), 0)

    people = [threading.Thread(target=label, args=(f"person {number}",)) for number in range(4)]
    for person in people:
        person.start()
    for person in people:
        person.join()
    assert len(read_ratings(this.ratings)) == 120


def test_a_rating_that_somebody_wrote_without_a_last_line_end_is_kept(run):
    this = run.round(1)
    this.ratings.write_text('{"question_id": "q1", "responses": [0, 1], "preferred": 0, "annotator": "anna"}')
    session = Labelling(draw_comparisons(this, number=100, seed=0), this.ratings)
    session.rate("anna", session.next_for("anna"), (0, 1), 0)
    assert len(read_ratings(this.ratings)) == 2


def rate_all(this, by_person):
    """Ratings of 0 against 1, by person a text of `0`, `1` and `-`, a question each."""
    this.ratings.write_text(
        "".join(
            HumanRating(
                question_id=f"q{number}",
                responses=(0, 1),
                preferred=None if said == "-" else int(said),
                annotator=person,
            ).model_dump_json() + "\n"
            for person, all_ in by_person.items()
            for number, said in enumerate(all_)
        )
    )  # fmt: skip


def test_agreement_is_that_of_the_table_made_by_hand(run):
    this = run.round(1)
    # The critic always prefers 0; anna says 0, 0, 0, 1 and ben 0, 1, 1, 1.
    rate_all(this, {"anna": "0001", "ben": "0111"})
    found = people_figures(run, 1)
    # Critic and people: 4 of 8 the same; by chance 1 * 4/8 = 1/2; kappa 0.
    assert (found["agreement_with_people"].value, found["agreement_with_people"].count) == (0.0, 8)
    assert found["agreement_with_people"].questions == 4
    # Anna and ben: q0 and q3 of 4 the same; by chance 3/4 * 1/4 + 1/4 * 3/4 = 3/8; kappa (1/2 - 3/8) / (5/8) = 1/5.
    assert found["agreement_between_people"].value == pytest.approx(0.2)
    assert found["agreement_between_people"].low < 0.2 < found["agreement_between_people"].high
    # With the critic's mind changed in half of the questions, it agrees beyond chance.
    scores = [Judgement(id=f"q{number}", rewards=[1.0, 0.0] if number < 2 else [0.0, 1.0]) for number in range(4)]
    write_jsonl(this.scores, scores)
    # The critic says 0 0 1 1: with anna 3 of 4, with ben 3 of 4; of all 8 people's labels 4 are 0: chance 1/2; kappa 1/2.
    assert people_figures(run, 1)["agreement_with_people"].value == pytest.approx(0.5)


def test_the_report_and_the_gates_hear_of_people_and_later_rounds_keep_what_they_said(run):
    this = run.round(1)
    gates = {"min_agreement_with_people": 0.3}
    with pytest.raises(UserError, match=r"could not be measured.*align label --round 1"):
        check_gates(this, gates)
    scores = [Judgement(id=f"q{n}", rewards=[1.0, 0.0] if n % 2 else [0.0, 1.0]) for n in range(NUM_QUESTIONS)]
    write_jsonl(this.scores, scores)
    rate_all(this, {"anna": "10" * 20})
    check_gates(this, gates)
    check_gates(run.round(2), gates)
    rate_all(this, {"anna": "1100" * 10})
    with pytest.raises(UserError, match=r"agreement_with_people is 0 "):
        check_gates(this, gates)
    data = read_run(run.path)
    assert critic_figures(data.rounds[0])["agreement_with_people"].count == NUM_QUESTIONS


def test_ratings_of_other_responses_are_left_out_and_counted(run, caplog):
    this = run.round(1)
    session = Labelling(draw_comparisons(this, number=5, seed=0), this.ratings)
    first = session.next_for("anna")
    session.rate("anna", first, (0, 1), 0)
    this.samples.write_text(this.samples.read_text().replace(first.texts[0], "A bowl."))
    assert current_ratings(this) == []
    assert "1 ratings are of other responses and are left out" in caplog.text


def test_after_twenty_labels_the_width_of_the_interval_is_said_and_not_the_agreement(run):
    this = run.round(1)
    judgements = [Judgement(id=f"q{n}", rewards=[1.0, 0.0] if n % 2 else [0.0, 1.0]) for n in range(NUM_QUESTIONS)]
    session = Labelling(draw_comparisons(this, number=100, seed=0), this.ratings, judgements)
    for number in range(20):
        assert session.how_sure() == ""
        session.rate("anna", session.next_for("anna"), (0, 1), number % 2)
    found = session.agreement()
    half = (found.high - found.low) / 2
    assert session.how_sure().startswith("After 20 labels")
    assert f"within ±{half:.2f}; after 80 it would be about ±{half / 2:.2f}." in session.how_sure()
    assert f"{found.kappa:.2f}" not in session.how_sure().replace(f"±{half:.2f}", "").replace(f"±{half / 2:.2f}", "")


def test_the_file_is_what_the_critic_of_ratings_reads(run):
    this = run.round(1)
    session = Labelling(draw_comparisons(this, number=1, seed=0), this.ratings)
    one = session.next_for("anna")
    session.rate("anna", one, (1, 0), 0)
    texts = (*one.texts, "a CUP")
    (judged,) = RatingsCritic(file=str(this.ratings)).judge([Item(one.question.id, "What?", (), texts)])
    assert judged.rewards[1] > judged.rewards[0]
    assert judged.unscored == {2: "nobody rated it"}


def test_a_round_without_responses_is_refused(tmp_path):
    with pytest.raises(UserError, match="align sample --round 1"):
        draw_comparisons(RunDir(tmp_path).round(1), number=5, seed=0)
