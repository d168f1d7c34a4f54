"""Sampling through 1, 2 and 4 OpenAI-compatible endpoints, and through two of which one dies in the middle.

The endpoints are stubs in processes of their own: each works on SLOTS requests at a time and takes a fixed time for
each, so the numbers say how well our side keeps endpoints busy, not how fast a model is.
Every question carries an image.

    python scripts/bench_server.py            questions/s in a table; the last line is the ratio of 4 endpoints to 1
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from align.config import Server, ServerSettings  # noqa: E402
from align.engines.base import SampleRequest, SampleResult, SamplingSettings  # noqa: E402
from align.engines.open import open_servers  # noqa: E402

SLOTS = 8
NUM_SAMPLES = 5


@dataclass
class Case:
    """A set of endpoints; with `dying`, the first of two is gone after it has had a quarter of the questions."""

    name: str
    num_endpoints: int
    dying: bool = False
    seconds: list[float] = field(default_factory=list)

    def least_s(self, num_questions: int, most: float) -> float:
        """The time that endpoints of `most` questions/s need if they are never idle and lose nothing."""
        if not self.dying:
            return num_questions / (most * self.num_endpoints)
        return (num_questions - num_questions // 4) / most


@contextlib.contextmanager
def stub(folder: Path, service_s: float, dies_at: int = 0) -> Iterator[str]:
    port_file = folder / f"port-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "tests.engines.stub_server", str(port_file), str(service_s), str(dies_at)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        while not port_file.exists():
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port_file.read_text()}"
    finally:
        process.kill()
        process.wait()


def run(case: Case, num_questions: int, service_s: float, image: Image.Image) -> float:
    """Seconds for all questions; every one must be answered exactly once."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        dies_at = num_questions // 4 if case.dying else 0
        urls = [
            stack.enter_context(stub(folder, service_s, dies_at if index == 0 else 0))
            for index in range(case.num_endpoints)
        ]
        engine = open_servers(
            [Server(url=url, model="policy") for url in urls],
            None,
            ServerSettings(concurrency=SLOTS, cooldown_s=5.0),
            open_image=lambda handle: image,
        )
        content = [{"type": "image"}, {"type": "text", "text": "What is shown?"}]
        requests = [
            SampleRequest(f"q{index}", [{"role": "user", "content": content}], ("image",), NUM_SAMPLES, 1000 * index)
            for index in range(num_questions)
        ]
        answered: list[str] = []

        def keep(result: SampleResult) -> None:
            assert len(result.texts) == NUM_SAMPLES
            answered.append(result.id)

        started = time.perf_counter()
        engine.sample(requests, SamplingSettings(temperature=1.0, max_new_tokens=64), keep)
        seconds = time.perf_counter() - started
    assert sorted(answered) == sorted(request.id for request in requests), "a question was lost or answered twice"
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=96, help="questions in a run")
    parser.add_argument("--service-s", type=float, default=2.0, help="seconds that a stub takes for a request")
    parser.add_argument("--repeats", type=int, default=3, help="how often each case runs, in turn")
    parser.add_argument("--image-px", type=int, default=448, help="width and height of the image")
    options = parser.parse_args()
    image = Image.effect_noise((options.image_px, options.image_px), 40).convert("RGB")
    cases = [
        Case("1 endpoint", 1),
        Case("2 endpoints", 2),
        Case("4 endpoints", 4),
        Case("2 endpoints, one dies after a quarter", 2, dying=True),
    ]
    for _ in range(options.repeats):
        for case in cases:
            case.seconds.append(run(case, options.questions, options.service_s, image))
    most = SLOTS / options.service_s
    print(
        f"stub endpoints: {SLOTS} requests at a time, {options.service_s:g} s each, so at most {most:g} questions/s"
        f" each; {options.questions} questions with an image of {options.image_px} x {options.image_px}, n ="
        f" {NUM_SAMPLES}, {options.repeats} runs in turn on {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f})"
    )
    print(f"{'':38} {'questions/s':>12} {'lowest':>8} {'highest':>8} {'of the most':>12}")
    for case in cases:
        rates = sorted(options.questions / seconds for seconds in case.seconds)
        rate = statistics.median(rates)
        share = case.least_s(options.questions, most) * rate / options.questions
        print(f"{case.name:38} {rate:12.1f} {rates[0]:8.1f} {rates[-1]:8.1f} {share:12.0%}")
    ratios = [one / four for one, four in zip(cases[0].seconds, cases[2].seconds, strict=True)]
    print(f"4 endpoints to 1: {min(ratios):.2f} to {max(ratios):.2f}; every question was answered once in every run")
    print(f"ratio: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
