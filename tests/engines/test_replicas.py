"""Servers that are started here: found by their address, restarted when they die, gone when whoever started them is."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import httpx
import psutil
import pytest

from align.engines.server.replicas import Launch, Replicas
from align.errors import UserError
from align.run.server_addresses import published
from tests.patience import PATIENCE_S, wait_until

ROOT = Path(__file__).parents[2]
HERE = httpx.Client(timeout=PATIENCE_S, trust_env=False)

# Answers `/v1/models` with its process id, has a child that outlives signals, and dies where asked to.
SERVER = """
import http.server, json, os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(7200)"],
                         start_new_session=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            os._exit(3)
        body = json.dumps({"data": [{"id": "m", "pid": os.getpid(), "child": child.pid, "given": os.environ.get("GIVEN")}]}).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *args): pass
print("serving", flush=True)
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def launch(*words):
    return Launch(lambda port: [sys.executable, "-c", SERVER, str(port), *words], {"GIVEN": "yes"})


def replicas(folder, count=1, *words, **changes):
    settings = {
        "model": "m",
        "logs": folder / "servers" / "sample",
        "max_restarts": 1,
        "start_timeout_s": PATIENCE_S,
        "stop_s": 1,
    }
    return Replicas([launch(*words)] * count, **{**settings, **changes})


def look(server):
    return HERE.get(f"{server.url}/v1/models").json()["data"][0]


def runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_servers_answer_on_ports_of_their_own_and_are_gone_afterwards(tmp_path):
    with replicas(tmp_path, 2) as started:
        seen = [look(server) for server in started.servers]
        assert len({server.url for server in started.servers}) == 2
        assert all(server.url.startswith("http://127.0.0.1:") for server in started.servers)
        assert [one["given"] for one in seen] == ["yes", "yes"]
        (addresses,) = published(tmp_path / "servers")
        assert (addresses.model, addresses.urls) == ("m", [server.url for server in started.servers])
        pids = [one[name] for one in seen for name in ("pid", "child")]
        assert all(map(runs, pids))
    assert not any(map(runs, pids))
    assert published(tmp_path / "servers") == []
    assert "serving" in (tmp_path / "servers" / "sample-1.log").read_text()


def test_a_server_that_does_not_listen_to_sigterm_is_killed(tmp_path):
    with replicas(tmp_path, 1, "deaf") as started:
        seen = look(started.servers[0])
    assert not runs(seen["pid"])
    assert not runs(seen["child"])


def die(server):
    with pytest.raises(httpx.HTTPError):
        HERE.get(f"{server.url}/die")


def test_a_server_that_dies_is_restarted_at_its_address_as_often_as_it_may(tmp_path):
    with replicas(tmp_path, max_restarts=1) as started:
        (server,) = started.servers
        first = look(server)
        die(server)

        def is_back():
            try:
                return look(server)["pid"] != first["pid"]
            except httpx.HTTPError:
                return False

        wait_until(is_back)
        assert not runs(first["child"]), "what a dead server leaves behind would hold its GPU"
        assert not started.ended(server.url)
        second = look(server)
        die(server)
        wait_until(lambda: started.ended(f"{server.url}/v1"))
        assert not runs(second["child"])
    assert "ended with code 3; 0 restarts left" in (tmp_path / "servers" / "sample-0.log").read_text()


def test_a_command_that_fails_is_reported_with_the_end_of_its_log(tmp_path):
    broken = Launch(lambda port: [sys.executable, "-c", "raise SystemExit('no such model')"], {})
    with (
        pytest.raises(UserError, match="no such model"),
        Replicas([broken], model="m", logs=tmp_path / "score", max_restarts=3, start_timeout_s=PATIENCE_S),
    ):
        raise AssertionError("it does not start")
    assert (tmp_path / "score-0.log").read_text().count("starting:") == 1, "it would fail again"


def test_a_server_that_never_answers_is_given_up_and_stopped(tmp_path):
    before = set(psutil.Process().children(recursive=True))
    mute = Launch(lambda port: [sys.executable, "-c", f"import time; time.sleep(7200); {port}"], {})
    started = Replicas([mute], model="m", logs=tmp_path / "score", max_restarts=0, start_timeout_s=1, stop_s=5)
    with pytest.raises(UserError, match="does not answer after 1 s"):
        started.__enter__()
    assert set(psutil.Process().children(recursive=True)) <= before


LOOP = """
import signal, sys, time
# A shell starts what runs in the background with this signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.engines.test_replicas import look, replicas
with replicas(Path(sys.argv[1]), 2) as started:
    print(*(one[name] for one in map(look, started.servers) for name in ("pid", "child")), flush=True)
    time.sleep(7200)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_the_one_that_started_it(tmp_path, number):
    code = textwrap.dedent(LOOP).format(root=str(ROOT))
    loop = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert loop.stdout is not None
    pids = [int(word) for word in loop.stdout.readline().split()]
    supervisors = [process.pid for process in psutil.Process(loop.pid).children()]
    assert len(pids) == 4
    assert len(supervisors) == 2
    os.kill(loop.pid, number)
    loop.wait()
    wait_until(lambda: not any(map(runs, [*pids, *supervisors])))


def test_a_server_dies_with_its_supervisor(tmp_path):
    if sys.platform != "linux":
        pytest.skip("Linux ends it")
    # Other tests leave processes, such as the tracker of multiprocessing.
    before = set(psutil.Process().children())
    with replicas(tmp_path) as started:
        seen = look(started.servers[0])
        (supervisor,) = set(psutil.Process().children()) - before
        supervisor.kill()
        wait_until(lambda: not runs(seen["pid"]))
        os.kill(seen["child"], signal.SIGKILL)
