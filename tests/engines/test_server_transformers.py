"""The server engine against `transformers serve`, a real server:
one that ignores `n` and shows no log-probabilities."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from align.config import Server, ServerSettings
from align.engines.base import SamplingSettings
from align.engines.local import LocalEngine
from align.engines.open import open_servers
from reward.judge_model import BranchedPrompt
from tests import tiny_vlms
from tests.engines.conftest import collect, question
from tests.patience import PATIENCE_S
from tests.tiny_models import random_image

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "openai", "uvicorn")),
    reason="needs transformers[serving]",
)

GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with a checkpoint, and the address of a `transformers serve` that serves it."""
    folder = tmp_path_factory.mktemp("served") / "policy"
    # Of the families with images, one whose processor the server can open without torchvision.
    tiny_vlms.save("gemma3", folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = shutil.which("transformers", path=os.path.dirname(sys.executable))
    assert program is not None
    command = [program, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield folder, f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(timeout=PATIENCE_S)


@pytest.mark.slow
def test_transformers_serve_gives_the_local_engines_greedy_texts(served):
    folder, url = served
    # It lists the models of its download cache only, so the list cannot be held against the name.
    server = Server(url=url, model=str(folder), check_model=False)
    settings = ServerSettings(wait_s=120, concurrency=2)
    engine = open_servers([server], None, settings, open_image=lambda image: image)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    local = LocalEngine(model, AutoProcessor.from_pretrained(folder), shared_prefix="off")
    requests = [question(number, num_samples=2) for number in range(3)]
    mine, theirs = (collect(one, requests, GREEDY) for one in (engine, local))
    assert {id_: result.texts for id_, result in mine.items()} == {id_: result.texts for id_, result in theirs.items()}
    assert {id_: result.num_tokens for id_, result in mine.items()} == {
        id_: result.num_tokens for id_, result in theirs.items()
    }
    assert any(text for result in mine.values() for text in result.texts)
    branched = BranchedPrompt((random_image(3, 40, 30),), None, "Is it ", (("red",), ("blue",)), "?", ())
    assert engine.generate([branched], max_new_tokens=8) == local.generate([branched], max_new_tokens=8)
    assert "one sample a request" in engine.notes["servers"]
