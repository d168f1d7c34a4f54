"""Talking to a checkpoint: answers as they grow, the conversation's memory, and the terminal."""

import functools
import io
import itertools
import os
import pty
import random
import select
import signal
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from align.chat.answers import Chat, Exchange
from align.chat.terminal import chat_in_terminal
from align.chat.web import Address, chat_on_page
from align.cli import main
from align.config import ModelSettings
from align.demo.canvas import draw
from align.demo.data import POLICY
from align.engines.base import SampleRequest, SamplingSettings
from align.engines.open import open_engine
from align.errors import UserError
from align.hub.model_card import lineage_of
from tests.forks import FORKS
from tests.patience import PATIENCE_S
from tests.test_video import write_video

GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=24)
WARM = SamplingSettings(temperature=1.0, max_new_tokens=24)
QUESTION = "Which digits do you see?"


@pytest.fixture(scope="module")
def chat():
    return Chat(str(POLICY))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), random.Random(0)
    for number in range(2):
        draw(rng, "eval").image().save(folder / f"{number}.png")
    return [folder / "0.png", folder / "1.png"]


def last_of(answers):
    return list(answers)[-1]


@pytest.mark.parametrize("shared_prefix", ["auto", "off"])
def test_streamed_answers_grow_into_what_sampling_gives(pictures, shared_prefix):
    engine = open_engine(str(POLICY), ModelSettings(), open_image=Image.open, shared_prefix=shared_prefix)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    request = SampleRequest("q", [{"role": "user", "content": content}], (pictures[0],), num_samples=3, seed=5)
    sampled, seen = [], []
    engine.sample([request], WARM, sampled.append)
    streamed = engine.stream(request, WARM, seen.append)
    assert streamed == sampled[0]
    assert len(seen) == max(streamed.num_tokens)
    assert seen[-1] == streamed.texts
    for before, after in itertools.pairwise(seen):
        assert all(new.startswith(old) for old, new in zip(before, after, strict=True))


def test_the_model_is_told_the_whole_conversation_with_its_pictures_in_place(chat, pictures):
    exchanges = [chat.ask(QUESTION, pictures[:1]).answered("I see 3."), chat.ask("Describe the picture.", pictures[1:])]
    texts = last_of(chat.answer(exchanges, GREEDY)).texts
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": "I see 3."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]},
    ]
    expected = []
    images = tuple(Image.open(file).convert("RGB") for file in pictures)
    chat.engine.sample([SampleRequest("q", messages, images, 1, 0)], GREEDY, expected.append)
    assert texts == expected[0].texts
    assert texts != last_of(chat.answer(exchanges[1:], GREEDY)).texts


def test_a_closed_stream_stops_the_model(chat, pictures, monkeypatch):
    steps, stream_of = [], chat.engine.stream

    def counted(request, settings, tell):
        return stream_of(request, settings, lambda texts: (steps.append(texts), tell(texts)))

    with monkeypatch.context() as patch:
        patch.setattr(chat.engine, "stream", counted)
        patch.setattr(chat.engine, "eos_token_ids", [])
        with closing(chat.answer([chat.ask(QUESTION, pictures[:1])], replace(WARM, max_new_tokens=400))) as stream:
            assert next(stream).cut is None
        num_steps = len(steps)
        assert num_steps < 400
        assert not chat._busy.locked()
    # Nothing is left behind: the next question is answered whole.
    assert last_of(chat.answer([Exchange("Hello")], GREEDY)).cut == (False,)
    assert len(steps) == num_steps


def test_a_video_is_the_frames_that_the_model_picks(chat, tmp_path):
    pytest.importorskip("av")
    write_video(tmp_path / "clip.mp4")
    shown = chat.ask("What happens?", [tmp_path / "clip.mp4"]).pictures
    # Valley looks at 8 frames of 13, evenly from the first to the last.
    assert [frame.info["video_frame"] for frame in shown] == [0, 1, 3, 5, 6, 8, 10, 12]


def test_an_answer_that_is_cut_says_so(chat, pictures):
    short = SamplingSettings(temperature=0.0, max_new_tokens=2)
    assert last_of(chat.answer([chat.ask(QUESTION, pictures[:1])], short)).cut == (True,)


def test_a_conversation_longer_than_the_context_is_refused(chat):
    with pytest.raises(UserError, match="the model reads at most"):
        list(chat.answer([Exchange("one " * 40_000)], GREEDY))


def typed(monkeypatch, capsys, lines, files=(), settings=GREEDY):
    """What is printed when these lines come through a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    capsys.readouterr()
    chat_in_terminal(str(POLICY), files, None, settings)
    return capsys.readouterr().out.splitlines()


def test_through_a_pipe_every_line_is_a_question_and_every_answer_a_line(chat, monkeypatch, capsys, pictures):
    printed = typed(monkeypatch, capsys, [QUESTION, "How many digits are there?", "/clear", QUESTION], pictures[:1])
    first = chat.ask(QUESTION, pictures[:1])
    with_picture = last_of(chat.answer([first], GREEDY)).texts[0]
    second = [first.answered(with_picture), Exchange("How many digits are there?")]
    without = last_of(chat.answer([Exchange(QUESTION)], GREEDY)).texts[0]
    assert printed == [with_picture, last_of(chat.answer(second, GREEDY)).texts[0], without]
    assert with_picture != without


def test_a_picture_can_be_shown_later_and_an_answer_be_had_again(chat, monkeypatch, capsys, pictures):
    show = f"/image '{pictures[1]}'"
    printed = typed(monkeypatch, capsys, [show, QUESTION, "/retry", "/retry"], settings=WARM)
    asked = [chat.ask(QUESTION, pictures[1:])]
    assert printed == [last_of(chat.answer(asked, WARM, seed=seed)).texts[0] for seed in range(3)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image no.png", "no image"),
        ("/image", "expected a file"),
        ("/image 'x", "names of files"),
        ("/retry", "asked"),
    ],
)
def test_a_line_that_cannot_be_obeyed_is_told(monkeypatch, capsys, line, message):
    with pytest.raises(UserError, match=message):
        typed(monkeypatch, capsys, [line])


def chat_on(terminal: str, *words: str) -> None:
    """`align chat` on a terminal, which becomes that of this process: Ctrl-C comes from it."""
    os.setsid()
    inner = os.open(terminal, os.O_RDWR)
    for number in range(3):
        os.dup2(inner, number)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.argv = ["align", "chat", *words]
    main()


def test_on_a_terminal_a_question_is_answered_and_ctrl_c_ends(pictures):
    answer = last_of(Chat(str(POLICY)).answer([Chat(str(POLICY)).ask(QUESTION, pictures[:1])], GREEDY)).texts[0]
    terminal, inner = pty.openpty()
    words = (os.ttyname(inner), str(POLICY), "--image", str(pictures[0]))
    process = FORKS.Process(target=chat_on, args=words)
    process.start()
    try:
        assert "/help" in "".join(read_until(terminal, "> "))
        os.close(inner)
        os.write(terminal, b"/nonsense\n")
        read_until(terminal, "> ", behind="there is no command /nonsense")
        os.write(terminal, QUESTION.encode() + b"\n")
        pieces = read_until(terminal, "> ", behind=answer)
        # While an answer is written it would end that alone. Python loses one that comes between the prompt and its wait
        # for a key (readline's), so it is pressed until it works.
        deadline, rest = time.monotonic() + PATIENCE_S, ""
        while process.is_alive() and time.monotonic() < deadline:
            os.write(terminal, b"\x03")
            if select.select([terminal], [], [], 0.5)[0]:
                rest += "".join(read_until(terminal, None))
        process.join(PATIENCE_S)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
        os.close(terminal)
    assert "Traceback" not in "".join(pieces) + rest


def read_until(terminal, ending, behind=""):
    """The pieces that a terminal shows, up to `ending` behind a text, or (None) its end.

    The prompt alone is no sign: it is drawn again while a line is echoed, and a piece may end there.
    """
    pieces, deadline = [], time.monotonic() + PATIENCE_S
    while ending is None or not ("".join(pieces).endswith(ending) and behind in "".join(pieces)):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"waited for {ending!r}, found {pieces}"
        try:
            piece = os.read(terminal, 4096)
        except OSError:
            break
        if not piece:
            break
        pieces.append(piece.decode())
    return pieces


def test_without_gradio_the_page_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install 'gradio\W"):
        chat_on_page([str(POLICY)], GREEDY, Address("127.0.0.1", 7860))


def test_a_lineage_is_what_the_card_says_and_nothing_else(tmp_path):
    assert lineage_of(tmp_path) is None
    card = (
        "---\nlicense: mit\n---\n\n# x, round 1\n\n## Lineage\n\n| round |\n|---|\n| 1 |\n\n## Data and critic\n\n* x\n"
    )
    (tmp_path / "README.md").write_text(card)
    assert lineage_of(tmp_path) == "| round |\n|---|\n| 1 |"
    assert lineage_of(Path(POLICY)) is None


def test_a_question_leaves_the_box_until_it_is_refused_or_stopped(chat):
    from align.chat.page import EMPTY, Page, Visit

    page, visit = Page([chat], GREEDY), Visit()
    page.build()
    unanswerable, answerable, wishes = (
        {"text": "What is on <image>?", "files": []},
        {"text": QUESTION, "files": []},
        (0.0, 24, 1),
    )
    (asked,) = page.ask(unanswerable, visit)
    assert (asked[page.box], [exchange.question for exchange in visit.talk.exchanges]) == (
        EMPTY,
        ["What is on <image>?"],
    )
    with pytest.raises(UserError, match=r"not answered yet.*Stop"):
        next(page.ask(answerable, visit))
    with pytest.raises(UserError, match="cannot be asked"):
        list(page.answer(visit, *wishes))
    (back,) = page.give_back(visit)
    assert (back[page.box], visit.talk.exchanges) == (unanswerable, ())
    list(page.ask(unanswerable, visit))
    list(page.stop(visit))
    assert len(visit.talk.exchanges) == 1
    assert [*page.answer(visit, *wishes), *page.give_back(visit)] == []
    list(page.clear(visit))
    list(page.ask(answerable, visit))
    *_, last = page.answer(visit, *wishes)
    assert last[page.shown][-1]["content"] == visit.talk.exchanges[0].answer == visit.talk.answers.texts[0] != ""
    assert [*page.answer(visit, *wishes), *page.give_back(visit)] == []


@pytest.mark.parametrize("overtaking", ["stop", "clear", "choose"])
def test_an_answer_ends_where_another_control_overtakes_it(chat, overtaking):
    from align.chat.page import Page, Visit

    page, visit = Page([chat], WARM), Visit()
    page.build()
    list(page.ask({"text": QUESTION, "files": []}, visit))
    changes = page.answer(visit, 1.0, 400, 3)
    while not visit.talk.answers.texts:
        next(changes)
    controls = {"stop": page.stop, "clear": page.clear, "choose": functools.partial(page.choose, 2)}
    list(controls[overtaking](visit))
    stands = visit.talk
    with pytest.raises(UserError, match="not answered yet"):
        next(page.ask({"text": QUESTION, "files": []}, visit))
    (last,) = changes
    assert visit.talk is stands
    assert [message["content"] for message in last[page.shown]] == [
        text for exchange in stands.exchanges for text in (exchange.question, exchange.answer)
    ]
    if overtaking != "clear":
        given = stands.answers.texts[2 if overtaking == "choose" else 0]
        assert [(exchange.question, exchange.answer) for exchange in stands.exchanges] == [(QUESTION, given)]
    assert len(list(page.ask({"text": QUESTION, "files": []}, visit))) == 1
