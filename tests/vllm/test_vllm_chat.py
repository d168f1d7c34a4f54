"""`align chat` with a vLLM server: streamed, stopped, under a name it has not, and when it goes away in the middle."""

import contextlib
import itertools
import socket
import threading

import httpx
import pytest
from typer.testing import CliRunner

from align.chat.answers import Chat, Exchange, messages_of, pictures_of
from align.cli import app
from align.engines.base import SampleRequest, SamplingSettings
from align.errors import UserError
from tests.patience import PATIENCE_S, wait_until
from tests.tiny_models import random_image

pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed")

GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=24)
# So long that it is still being written whatever happens in a test.
ENDLESS = SamplingSettings(temperature=0.0, max_new_tokens=1900)


@pytest.fixture
def url(engines):
    (endpoint,) = engines[1].fleet.endpoints
    return endpoint.url.removesuffix("/v1")


def metric(url, name):
    """The sum of one of vLLM's own metrics."""
    lines = httpx.get(f"{url}/metrics", timeout=PATIENCE_S, trust_env=False).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


def test_a_conversation_with_pictures_streams_into_the_local_engines_answer(engines, url, tmp_path):
    for index in range(2):
        random_image(index, 90, 120).save(tmp_path / f"{index}.png")
    chat = Chat(url)
    assert chat.model == "judge"
    asked = [
        chat.ask("What is it?", [tmp_path / "0.png"]).answered("A cup."),
        chat.ask("And this?", [tmp_path / "1.png"]),
    ]
    seen = list(chat.answer(asked, GREEDY))
    assert len(seen) > 1
    assert all(new.texts[0].startswith(old.texts[0]) for old, new in itertools.pairwise(seen))
    found = []
    request = SampleRequest("chat", messages_of(asked), pictures_of(asked), 1, seed=0)
    engines[0].sample([request], GREEDY, found.append)
    assert seen[-1].texts == found[0].texts
    assert seen[-1].cut == (True,)


def test_several_answers_grow_side_by_side(url):
    settings = SamplingSettings(temperature=1.0, max_new_tokens=24)
    *_, last = Chat(url).answer([Exchange("What is it?")], settings, num_answers=3, seed=1)
    assert len(set(last.texts)) == 3


def test_the_command_prints_what_the_local_engine_says(engines, url):
    exchange = Exchange("What is it?")
    found = []
    engines[0].sample([SampleRequest("chat", messages_of([exchange]), (), 1, seed=0)], GREEDY, found.append)
    done = CliRunner().invoke(app, ["chat", url, "-q", "What is it?", "--max-new-tokens", "24"])
    assert done.output == f"{found[0].texts[0]}\n"


def test_an_answer_that_is_stopped_occupies_the_server_no_longer(url):
    before = metric(url, "vllm:generation_tokens_total")
    answer = Chat(url).answer([Exchange("What is it?")], ENDLESS)
    next(answer)
    answer.close()
    wait_until(lambda: metric(url, "vllm:num_requests_running") == 0)
    assert 0 < metric(url, "vllm:generation_tokens_total") - before < ENDLESS.max_new_tokens
    *_, last = Chat(url).answer([Exchange("And now?")], GREEDY)
    assert len(last.texts[0]) == 24


def test_a_name_that_is_not_served_is_answered_with_those_that_are(url):
    with pytest.raises(UserError, match="serves 'judge', not 'policy-3'"):
        Chat(f"{url}#policy-3")


class Wire:
    """A way to the server that can be cut: nobody is reached through it any more then, as if the server were gone."""

    def __init__(self, port):
        self.port, self.sockets, self.has_passed = port, [], threading.Event()
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listening.accept()
                server = socket.create_connection(("127.0.0.1", self.port))
                self.sockets += [client, server]
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(2**16):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def cut(self):
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        for each in self.sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def test_a_server_that_goes_away_in_the_middle_of_an_answer_ends_it_with_its_address(url):
    wire = Wire(int(url.rpartition(":")[2]))
    chat = Chat(wire.url)
    answer = chat.answer([Exchange("What is it?")], ENDLESS)
    next(answer)
    wire.cut()
    with pytest.raises(UserError, match=wire.url):
        list(answer)
    wait_until(lambda: metric(url, "vllm:num_requests_running") == 0)
