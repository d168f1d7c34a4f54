"""An OpenAI-compatible server of canned answers that counts what it is asked and misbehaves on request.

It runs in a thread of the test's process, or as `python -m tests.engines.stub_server PORT_FILE` in its own.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = "policy"
KEY = "sk-very-secret-0123456789"

Body = dict[str, Any]


@dataclass
class Reply:
    """What goes over the wire: `body` as JSON, or bytes as they are. `drop`: the connection is cut instead.

    `claim_bytes` is announced as the length; `trickle_s` is slept before every byte.
    """

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    claim_bytes: int | None = None
    trickle_s: float = 0.0


Behaviour = Callable[[Body, int], Reply | None]


class StubServer:
    """`behave(body, count)` may answer the count-th real request (probes not counted) instead of `answer`.

    `service_s` is slept through for every request; `has_n`, `has_extras`, `streams` are abilities.
    """

    def __init__(
        self,
        *,
        behave: Behaviour | None = None,
        answer: Callable[[Body], Body] | None = None,
        models: tuple[str, ...] = (MODEL,),
        card: dict[str, Any] | None = None,
        key: str | None = None,
        service_s: float = 0.0,
        has_n: bool = True,
        has_extras: bool = True,
        streams: bool = True,
        slots: int | None = None,
        port: int = 0,
    ) -> None:
        self.behave, self.answer, self.models, self.key = behave, answer, models, key
        # What the list of models says of each beside its name.
        self.card = card or {}
        self.service_s, self.has_n, self.has_extras, self.streams = service_s, has_n, has_extras, streams
        # A real server works on so many requests at a time; the others wait.
        self.slots = threading.Semaphore(slots) if slots else None
        self.lock = threading.Lock()
        self.num_requests = self.num_probes = self.in_flight = self.most_in_flight = 0
        self.asked: list[Body] = []
        self.http = _Http(("127.0.0.1", port), _Handler)
        self.http.stub = self
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def port(self) -> int:
        return self.http.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """Refuse connections from now on and cut those that are open."""
        self.http.dead = True
        self.http.shutdown()
        self.http.server_close()

    def handle(self, body: Body) -> Reply:
        real = not is_probe(body)
        with self.lock:
            self.num_requests += real
            self.num_probes += not real
            count = self.num_requests
            if real:
                self.asked.append(body)
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if real and self.slots is not None:
                with self.slots:
                    time.sleep(self.service_s)
            else:
                time.sleep(self.service_s if real else 0)
            reply = self.behave(body, count) if real and self.behave else None
            return reply or self.normal(body)
        finally:
            with self.lock:
                self.in_flight -= real

    def normal(self, body: Body) -> Reply:
        unknown = {"top_k", "repetition_penalty", "return_token_ids"} & body.keys()
        if unknown and not self.has_extras:
            return Reply({"detail": f"Unexpected fields in the request: {unknown}"}, 422)
        if self.answer is not None:
            return Reply(self.answer(body))
        num = body.get("n", 1) if self.has_n else 1
        texts = [said(body, index) for index in range(num)]
        return events(texts) if body.get("stream") and self.streams else Reply(completion(texts))


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    stub: StubServer
    dead = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # connections are cut on purpose


class _Handler(BaseHTTPRequestHandler):
    server: _Http
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self._is_dead() or self._is_denied():
            return
        stub = self.server.stub
        self._send(Reply({"object": "list", "data": [{"id": name, "root": name, **stub.card} for name in stub.models]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._is_dead() or self._is_denied():
            return
        if body["model"] not in self.server.stub.models:
            self._send(Reply({"error": {"message": f"The model `{body['model']}` does not exist."}}, 404))
            return
        reply = self.server.stub.handle(body)
        if not self._is_dead():
            self._send(reply)

    def _is_dead(self) -> bool:
        if self.server.dead:
            self.close_connection = True
        return self.server.dead

    def _is_denied(self) -> bool:
        key = self.server.stub.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        # As OpenAI's does: the wrong key is repeated in the message.
        self._send(Reply({"error": {"message": f"Incorrect API key provided: {self.headers['Authorization']}"}}, 401))
        return True

    def _send(self, reply: Reply) -> None:
        if reply.drop:
            self.close_connection = True
            self.connection.close()
            return
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        self.send_header("Content-Length", str(reply.claim_bytes or len(data)))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        for piece in (data[i : i + 1] for i in range(len(data))) if reply.trickle_s else [data]:
            time.sleep(reply.trickle_s)
            self.wfile.write(piece)
        if reply.claim_bytes:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


def is_probe(body: Body) -> bool:
    return body["messages"][0]["content"] in ("Say hello.", "Count from one to five in words.")


def question_text(body: Body) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def said(body: Body, index: int) -> str:
    """A sample that depends on the question and on its seed alone, where choice i has the request's seed plus i."""
    return f"{question_text(body)} -> {body.get('seed', 0) + index}"


def completion(texts: list[str], **more: Any) -> Body:
    """A chat completion in which every text has as many tokens as characters."""
    choices = [
        {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"} | more
        for index, text in enumerate(texts)
    ]
    return {
        "object": "chat.completion",
        "choices": choices,
        "usage": {"prompt_tokens": 7, "completion_tokens": sum(map(len, texts))},
    }


def events(texts: list[str], *, num_events: int | None = None) -> Reply:
    """A completion as a stream, a word of one choice per event; only the first events where a number is given."""
    words = [(index, word) for index, text in enumerate(texts) for word in re.findall(r"\S+\s*", text)]
    parts: list[Body] = [{"index": index, "delta": {"content": word}} for index, word in words]
    parts += [{"index": index, "delta": {}, "finish_reason": "stop"} for index in range(len(texts))]
    lines = [f"data: {json.dumps({'choices': [part]})}\n\n" for part in parts[:num_events]]
    end = [] if num_events else ["data: [DONE]\n\n"]
    return Reply("".join([": ping\n\n", *lines, *end]).encode(), headers={"Content-Type": "text/event-stream"})


def main() -> None:
    """Serve until killed, dying by itself before the real request of the number given; the port goes into a file."""
    port_file, service_s, dies_at = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])

    def behave(body: Body, count: int) -> Reply | None:
        if dies_at and count >= dies_at:
            import os

            os._exit(1)
        return None

    server = StubServer(behave=behave, service_s=service_s, slots=8)
    temporary = port_file.with_suffix(".tmp")
    temporary.write_text(str(server.port))
    temporary.rename(port_file)
    server.thread.join()


if __name__ == "__main__":
    main()
