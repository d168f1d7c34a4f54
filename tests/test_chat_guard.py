"""What the chat page answers to requests that are not its own: no foreign name is served, no traceback is printed."""

import asyncio
import json
import shutil
import socket
from pathlib import Path

import pytest

from align.chat.guard import Guard
from align.demo.data import POLICY
from tests.patience import PATIENCE_S, wait_until
from tests.served import Served

OWN = "Host: 127.0.0.1\r\nConnection: close\r\n"


async def _application(scope, receive, send):
    if scope["path"] == "/config":
        raise ValueError("no such thing")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"the page"})


def answer(path="/", hosts=("127.0.0.1:7860",), kind="http", names=("gpu7",)):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "headers": [(b"host", host.encode()) for host in hosts]}
    asyncio.run(Guard(_application, Path("/tmp/uploads"), names)(scope, None, send))
    return sent[0].get("status", sent[0]["type"])


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "[::1]:7860", "gpu7:7860", "192.168.0.9"])
def test_the_page_is_served_under_its_own_names(host):
    assert answer(hosts=[host]) == 200


@pytest.mark.parametrize(
    "hosts",
    [["evil.example"], ["127.0.0.1.evil.example:7860"], ["localhost.evil"], [], [""], ["127.0.0.1", "evil.example"]],
)
def test_foreign_names_are_refused(hosts):
    assert answer(hosts=hosts) == 403


def test_what_the_application_cannot_take_is_a_bad_request():
    assert answer("/config") == 400
    assert answer("/gradio_api/file=/tmp/uploads/\0") == 403


def test_no_other_protocol_is_spoken():
    assert answer(kind="websocket") == "websocket.close"


def events():
    """Bodies for the queue that the page would never send."""
    values = [[], None, [1] * 50, [{"path": "/etc/passwd"}] * 9, "x"]
    known = [{"data": value, "fn_index": number, "session_hash": "a"} for value in values for number in range(14)]
    odd = [{"data": [], "fn_index": "y", "session_hash": 5}, {}, [], None]
    return [json.dumps(body).encode() for body in known + odd] + [b"{", b"\xff\xfe", b"[" * 100_000]


def test_malformed_requests_print_no_traceback(tmp_path):
    pytest.importorskip("gradio")
    shutil.copytree(POLICY, tmp_path / "checkpoint")
    served = Served(tmp_path, "chat", "checkpoint", "--web")
    port = int(served.url.rsplit(":", 1)[1].rstrip("/"))

    def status(request: bytes) -> int:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
            connection.sendall(request)
            return int(connection.recv(4096).split(b" ", 2)[1])

    def post(path: str, body: bytes, kind: str = "application/json") -> int:
        head = f"POST {path} HTTP/1.1\r\n{OWN}Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        return status(head.encode() + body)

    try:
        assert status(b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n") == 403
        assert status(f"GET /static/{'a' * 5000} HTTP/1.1\r\n{OWN}\r\n".encode()) == 400
        assert {post("/gradio_api/queue/join", body) for body in events()} <= {200, 400, 422}
        assert post("/gradio_api/upload", b"--x\r\nnope", "multipart/form-data; boundary=x") in (200, 400)
        assert status(b"GARBAGE\r\n\r\n") == 400
        assert status(f"GET / HTTP/1.1\r\n{OWN}\r\n".encode()) == 200
        # Events are worked through after they were taken.
        wait_until(lambda: "a request to the page failed" in served.errors)
    finally:
        served.stop()
    assert "Traceback" not in served.errors
