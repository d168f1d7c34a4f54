"""`align push`: what would go up, and what is refused."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from align.errors import UserError
from align.hub.push import push
from align.run.manifest import Manifest
from tests.tiny_models import save_llava_onevision


@pytest.fixture
def checkpoint(tmp_path):
    return save_llava_onevision(tmp_path / "round-1" / "checkpoint")


def test_a_dry_run_lists_the_files_that_would_go_up_and_no_others(checkpoint):
    (checkpoint / ".cache").mkdir()
    (checkpoint / ".cache" / "x").write_text("x")
    (checkpoint / "optimizer.pt").write_bytes(b"x")
    files = push(checkpoint, "me/model", dry_run=True).files
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert not {".cache/x", "optimizer.pt"} & set(files)
    assert files["model.safetensors"] == (checkpoint / "model.safetensors").stat().st_size


def test_half_written_checkpoints_are_refused(checkpoint):
    manifest = Manifest(checkpoint.parent / "manifest.json")
    manifest.begin("dpo", settings={}, inputs={})
    with pytest.raises(UserError, match="has not finished"):
        push(checkpoint, "me/model", dry_run=True)
    manifest.finish("dpo", outputs=[], counts={}, seconds=0.0)
    assert push(checkpoint, "me/model", dry_run=True).files
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"expected .* bytes"):
        push(checkpoint, "me/model", dry_run=True)


@pytest.mark.parametrize("repo", ["model", "a/b/c", "/model", "me/"])
def test_a_name_that_is_no_repository_is_refused(checkpoint, repo):
    with pytest.raises(UserError, match="owner/name"):
        push(checkpoint, repo, dry_run=True)


@pytest.mark.parametrize("repo", ["me/a model", "me/-x", "me/a--b", "me/a..b", "me/" + "x" * 97, "me/x.git"])
def test_a_name_that_the_hub_would_refuse_is_refused_before(checkpoint, repo):
    with pytest.raises(UserError, match="takes no repository of this name"):
        push(checkpoint, repo, dry_run=True)


def test_a_hub_that_cannot_be_reached_is_no_missing_login(checkpoint, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached at http") as fault:
        push(checkpoint, "me/model")
    assert "\n" not in str(fault.value)
    assert "log in" not in str(fault.value)


def test_a_hub_that_refuses_names_the_login(checkpoint, monkeypatch):
    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(UserError, match="did not take it") as fault:
            push(checkpoint, "me/model")
        server.shutdown()
    assert "hf auth login" in str(fault.value)
