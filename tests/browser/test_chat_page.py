"""The chat page as it is served, in a real browser: answers, refusals, and that it keeps to itself."""

import random
import re
import shutil
import threading
from contextlib import contextmanager

import pytest

from align.chat.terminal import chat_in_terminal
from align.demo.canvas import draw
from align.demo.data import POLICY
from align.engines.base import SamplingSettings
from tests.browser.chromium import Page, find_chromium
from tests.engines.stub_server import StubServer
from tests.patience import PATIENCE_S
from tests.served import Served
from tests.test_images import bomb

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
QUESTION = "Which digits do you see?"
LINEAGE = "\n\n## Lineage\n\n| round | pairs |\n|---|---|\n| 1 | 4242 |\n"


@contextmanager
def serving(folder, model="checkpoint"):
    shutil.copytree(POLICY, folder / "checkpoint")
    (folder / "checkpoint" / "README.md").write_text(f"---\nlicense: mit\n---\n\n# x, round 1{LINEAGE}")
    served = Served(folder, "chat", model, "--web")
    try:
        yield served
    finally:
        served.kill()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("served")) as served:
        yield served


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "digits.png"
    draw(random.Random(0), "eval").image().save(path)
    return path


@pytest.fixture(scope="module")
def browser(served, tmp_path_factory):
    assert CHROMIUM is not None
    own = (served.url, "data:", "about:", "blob:")
    with Page(CHROMIUM, tmp_path_factory.mktemp("profile"), own) as browser:
        yield browser


@pytest.fixture
def page(browser, served):
    visit(browser, served, 1440)
    browser.problems.clear()
    return browser


# Gradio's page handles each message of the server in a task of its own. Counted are the controls that have ended; where
# `prompt_changes` is set, the messages after so many changes come late and in one task, as on a busy machine.
MESSAGES = """(() => {
    const later = window.setTimeout, held = [];
    window.ended = 0, window.prompt_changes = Infinity;
    window.setTimeout = (act, delay, message, ...rest) => {
        if (!message || !message.msg) return later(act, delay, message, ...rest);
        const told = () => { act(message); window.ended += message.msg === 'process_completed' };
        window.prompt_changes -= message.msg === 'process_generating';
        if (window.prompt_changes >= 0 && !held.length) return later(told, delay);
        held.push(told);
        if (held.length === 1) later(() => held.splice(0).forEach(told => told()), 1000);
    };
})()"""


def visit(browser, served, width):
    browser.visit(served.url, width=width)
    browser.wait("document.querySelector('#question textarea') !== null")
    browser.run(MESSAGES)


def upload(page, *files):
    root = page.call("DOM.getDocument")["root"]["nodeId"]
    node = page.call("DOM.querySelector", nodeId=root, selector="#question input[type=file]")["nodeId"]
    page.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])
    page.wait(f"document.querySelectorAll('#question img').length === {len(files)}")


def send(page, text):
    page.run("document.querySelector('#question textarea').focus()")
    page.call("Input.insertText", text=text)
    page.wait(f"{BOX} === {text!r}")
    page.press("Enter")


def ask(page, text):
    send(page, text)
    # The box is emptied, the question answered, and what was refused given back.
    page.wait("window.ended === 3")


def click(page, button):
    page.run(
        f"[...document.querySelectorAll('#controls button')].find(e => e.textContent.includes({button!r})).click()"
    )


def set_number(page, label, value):
    page.run(f"document.querySelector('input[type=number][aria-label*=\"{label}\"]').select()")
    page.call("Input.insertText", text=str(value))
    page.run("document.activeElement.blur()")


SAID = "[...document.querySelectorAll('#conversation [data-testid=bot] .message-content')].map(e => e.textContent)"
ASKED = "[...document.querySelectorAll('#conversation [data-testid=user] .message-content')].map(e => e.textContent)"
SIDE_BY_SIDE = "[...document.querySelectorAll('#answers textarea')].map(e => e.value)"
TOLD = "[...document.querySelectorAll('.toast-body')].map(e => e.textContent).join()"
BOX = "document.querySelector('#question textarea').value"


def test_the_page_answers_as_the_terminal_does(page, picture, capsys):
    upload(page, picture)
    ask(page, QUESTION)
    capsys.readouterr()
    chat_in_terminal(str(POLICY), [picture], QUESTION, SamplingSettings(0.0, 512))
    assert page.run(SAID) == [capsys.readouterr().out.strip()]
    assert page.problems == []


def test_one_of_several_answers_is_chosen_to_go_on_from(page, picture):
    upload(page, picture)
    set_number(page, "Temperature", 1.5)
    set_number(page, "Answers side by side", 4)
    ask(page, QUESTION)
    answers = page.run(SIDE_BY_SIDE)
    assert len(answers) == 4
    assert len(set(answers)) > 1
    other = next(index for index, answer in enumerate(answers) if answer != answers[0])
    page.run(
        f"document.querySelectorAll('#answers > .column button.secondary, #answers > .column button.primary')[{other}].click()"
    )
    page.wait(f"({SAID})[0] === {answers[other]!r}")
    click(page, "Clear")
    page.wait(f"({SAID}).length === 0 && ({SIDE_BY_SIDE}).length === 0")
    assert page.problems == []


def test_what_a_visitor_writes_stands_as_it_was_written(page):
    text = "<b>bold</b> *star* <img src=x onerror=alert(1)> &lt;"
    ask(page, text)
    assert page.run(ASKED) == [text]
    assert page.problems == []


def test_a_picture_that_is_a_bomb_is_refused_with_a_message(page, served, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb())
    upload(page, path)
    ask(page, "What is it?")
    page.wait(f"({TOLD}).includes('too large')")
    assert str(served.temporary) not in page.run(TOLD)
    assert page.run(SAID) == []
    assert page.run(BOX) == "What is it?"


@pytest.fixture(params=[0, 1, 2, 3])
def late(page, request):
    page.run(f"window.prompt_changes = {request.param}")
    return page


def test_a_refused_question_stands_in_the_box_again(late):
    ask(late, "What is on <image>?")
    late.wait(f"({TOLD}).includes('cannot be asked')")
    late.wait(f"{BOX} === 'What is on <image>?' && ({ASKED}).length === 0")


def test_an_answered_question_has_left_the_box(late):
    ask(late, QUESTION)
    assert (late.run(BOX), late.run(ASKED), len(late.run(SAID))) == ("", [QUESTION], 1)


def test_a_question_waits_in_the_box_until_the_one_before_is_answered_or_stopped(browser, tmp_path):
    answering = threading.Event()

    def answer_the_first_late(body, count):
        if count == 1:
            answering.wait(PATIENCE_S)

    server = StubServer(behave=answer_the_first_late)
    with serving(tmp_path, server.url) as served:
        visit(browser, served, 1440)
        send(browser, "First?")
        browser.wait(f"{BOX} === '' && ({ASKED}).length === 1")
        send(browser, "Second?")
        browser.wait(f"({TOLD}).includes('not answered yet')")
        assert browser.run(BOX) == "Second?"
        click(browser, "Stop")
        # Both questions were taken or refused, and Stop was heard.
        browser.wait("window.ended === 3")
        answering.set()
        # Both are neither answered nor given back.
        browser.wait("window.ended === 7")
        browser.press("Enter")
        browser.wait(f"({SAID}).join() === 'Second? -> 1'")
        assert browser.run(ASKED) == ["First?", "Second?"]
    server.stop()


def test_only_what_was_uploaded_can_be_fetched(page, served, picture):
    upload(page, picture)
    own = page.run("document.querySelector('#question img').src")
    assert own.startswith("blob:") or served.status(own.removeprefix(served.url)) == 200
    uploaded = next(served.temporary.glob("align-chat-*/*/digits.png"))
    assert served.status(f"gradio_api/file={uploaded}") == 200
    for path in (
        "gradio_api/file=/etc/passwd",
        f"gradio_api/file={POLICY / 'config.json'}",
        f"gradio_api/file={uploaded}/../../../../errors.txt",
        "gradio_api/file=README.md",
        "gradio_api/file=http://127.0.0.1/",
        "gradio_api/file/etc/passwd",
        "file=/etc/passwd",
        "gradio_api/proxy=http://127.0.0.1/",
        "gradio_api/info",
        "static/..%2f..%2froutes.py",
    ):
        assert served.status(path) == 403, path


@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_fits_and_shows_the_lineage(browser, served, width):
    browser.problems.clear()
    visit(browser, served, width)
    assert "· ValleyQwen2ForCausalLM · mit" in browser.run("document.body.innerText")
    browser.run("document.querySelector('button.label-wrap').click()")
    browser.wait("document.body.innerText.includes('4242')")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.problems == []


def test_the_server_speaks_to_no_other_machine(page, served):
    ask(page, QUESTION)
    addresses = re.findall(r"^ADDRESS socket\.(\w+) (\S+)$", served.errors, flags=re.MULTILINE)
    assert ("bind", "127.0.0.1") in addresses
    assert {address for _, address in addresses} == {"127.0.0.1"}


def test_a_second_page_at_the_same_address_is_told(served, capsys):
    from align.chat.web import Address, chat_on_page
    from align.errors import UserError

    port = int(served.url.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}.*--port"):
        chat_on_page([str(POLICY)], SamplingSettings(0.0, 8), Address("127.0.0.1", port))


def test_ctrl_c_ends_the_page_and_deletes_what_was_uploaded(tmp_path, browser, picture):
    with serving(tmp_path) as served:
        visit(browser, served, 1440)
        upload(browser, picture)
        assert list(served.temporary.glob("align-chat-*"))
        assert served.stop() == 0
        assert list(served.temporary.glob("align-chat-*")) == []
        assert "Traceback" not in served.errors
