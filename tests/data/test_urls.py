"""Images behind URLs: fetched only where that is allowed, within limits, once, and never from an inner network."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from align.data.entry import BadRow
from align.data.pictures import PictureStore
from align.data.urls import UrlCache
from tests.data.sources import imported, png, write_jsonl


class Server(BaseHTTPRequestHandler):
    """Serves one picture; /big sends without end, /slow a byte at a time, /loop redirects to itself."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        if self.path == "/gone.png":
            self.send_error(404)
            return
        if self.path in ("/loop", "/moved", "/away", "/file"):
            places = {
                "/loop": "/loop",
                "/moved": "/a.png",
                "/away": "http://10.0.0.1/a.png",
                "/file": "file:///etc/passwd",
            }
            self.send_response(302)
            self.send_header("Location", places[self.path])
            self.end_headers()
            return
        self.send_response(200)
        if self.path == "/cut.png":
            self.send_header("Content-Length", "100000")
        self.end_headers()
        try:
            for _ in range(1000 if self.path in ("/big", "/slow") else 0):
                self.wfile.write(b"x" if self.path == "/slow" else b"x" * 10_000)
                time.sleep(0.02 if self.path == "/slow" else 0)
            self.wfile.write(png(1))
        except OSError:
            pass  # the client hung up

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    Server.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def cache(tmp_path, **limits):
    return UrlCache(tmp_path / "cache", **({"is_allowed": lambda address: address == "127.0.0.1"} | limits))


def test_an_image_is_fetched_once_and_kept(address, tmp_path):
    assert cache(tmp_path).fetch(f"{address}/moved") == png(1)
    assert cache(tmp_path).fetch(f"{address}/moved") == png(1)
    assert Server.asked == ["/moved", "/a.png"]


def test_what_failed_is_not_asked_for_again(address, tmp_path):
    store = PictureStore(tmp_path, tmp_path / "out", 1, urls=cache(tmp_path))
    for _ in range(3):
        with pytest.raises(BadRow, match="the server says 404"):
            store.take(f"{address}/gone.png")
    assert Server.asked == ["/gone.png"]
    picture = store.take({"bytes": None, "path": f"{address}/a.png"})
    assert (tmp_path / "out" / picture.reference).read_bytes() == png(1)


@pytest.mark.parametrize(
    ("path", "limits", "says"),
    [
        ("/big", {"max_bytes": 50_000}, "more than 50000 bytes"),
        ("/slow", {"timeout_s": 0.5}, "too slow|timed out"),
        ("/loop", {}, "more than 5 redirects"),
        ("/away", {}, "10.0.0.1, which is not on the open Internet"),
        ("/file", {}, "not an http or https URL"),
        ("/cut.png", {}, "of 100000 bytes came|IncompleteRead"),
    ],
)
def test_limits_hold(path, limits, says, address, tmp_path):
    with pytest.raises(BadRow, match=says):
        cache(tmp_path, **limits).fetch(f"{address}{path}")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "169.254.169.254", "localhost"]
)
def test_inner_networks_are_refused(host, tmp_path):
    with pytest.raises(BadRow, match="not on the open Internet"):
        UrlCache(tmp_path).fetch(f"http://{host}:9/a.png")


def test_urls_are_left_out_unless_they_are_allowed(address, tmp_path):
    urls = [f"{address}/a.png", "s3://bucket/a.png"]
    source = write_jsonl(
        tmp_path / "a.jsonl", [{"question": "What?", "image": url} for url in urls] + [{"question": "?"}]
    )
    done = imported(source, tmp_path / "out")
    assert done.counts.dropped == {"image is a URL": 2}
    assert "--allow-urls fetches it" in done.counts.faults[0]
    allowed = imported(source, tmp_path / "out", allow_urls=True)
    assert allowed.counts.dropped == {"image cannot be fetched": 1, "image is a URL": 1}
    assert Server.asked == []
