"""Critics behind a server, on responses whose order is known by construction: every judging kind, and the two controls.

The stub judges by a rule that looks: pictures are of one shade of grey, responses name shades,
and the nearer the better.
"""

from __future__ import annotations

import base64
import io
import re

import pytest
from PIL import Image

from align.records import Question, Response, Samples, write_jsonl
from align.run.folder import RunDir
from tests.critic_runs import score, score_lines
from tests.engines.stub_server import MODEL, StubServer, completion, is_probe

SHADES = (10, 90, 170, 250)
RESPONSES = ("It has shade 0.", "It has shade 100.", "It has shade 200.")
NEAR = 60


def shade_in(body) -> float:
    parts = [part for part in body["messages"][-1]["content"] if part["type"] == "image_url"]
    data = base64.b64decode(parts[0]["image_url"]["url"].split(",")[1])
    return float(Image.open(io.BytesIO(data)).convert("L").getpixel((0, 0)))


def by_rule(body):
    """Judge by the distance between the shade seen and the shades named."""
    if is_probe(body):
        return completion(["hello"])
    text = body["messages"][-1]["content"][-1]["text"]
    seen = shade_in(body)
    distances = [abs(seen - int(named)) for named in re.findall(r"shade (\d+)", text)]
    if "second response" in text:
        return completion(["first" if distances[0] < distances[1] else "second"])
    if "Score" in text:
        return completion([f"Score: {100 - distances[0] / 2.55:.0f}/100, because I looked."])
    return completion(["Yes" if distances[0] < NEAR else "No"])


def always_first(body):
    return completion(["first"])


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        servers.append(StubServer(answer=answer))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def write_round(folder, responses=RESPONSES):
    (folder / "images").mkdir()
    lines = []
    for index, shade in enumerate(SHADES):
        Image.new("RGB", (32, 32), (shade, shade, shade)).save(folder / f"images/{index}.png")
        question = Question(id=f"q{index}", question="Which shade?", images=[f"images/{index}.png"])
        made = [Response(text=text, num_tokens=5) for text in responses]
        lines.append(Samples(id=question.id, question=question, responses=made, seed=0))
    write_jsonl(folder / "questions.jsonl", [line.question for line in lines])
    this = RunDir(folder / "runs/run").round(1)
    this.path.mkdir(parents=True)
    write_jsonl(this.samples, lines)
    this.manifest.begin("sample", settings={}, inputs={})
    this.manifest.finish("sample", outputs=[this.samples], counts={}, seconds=0.0)


def judged(folder, server, kind, **more):
    options = {"read": "text"} | more.pop("options", {})
    servers = [{"url": server.url, "model": MODEL}]
    return score(folder, kind=kind, servers=servers, options=options, **more)["critic"]


def nearest_first(line, shade):
    """The responses in the order of their rewards, and in the order of their distance to the shade."""
    named = [int(re.findall(r"\d+", text)[0]) for text in RESPONSES]
    by_reward = sorted(range(3), key=lambda index: -line.rewards[index])
    return by_reward, sorted(range(3), key=lambda index: abs(named[index] - shade))


@pytest.mark.parametrize("kind", ["pairwise", "pointwise"])
def test_rewards_follow_the_order_that_was_built_in(tmp_path, serve, kind):
    write_round(tmp_path)
    prompt = {"prompt": "pairwise_short"} if kind == "pairwise" else {}
    found = judged(tmp_path, serve(by_rule), kind, **prompt)
    for line, shade in zip(score_lines(tmp_path), SHADES, strict=True):
        by_reward, by_distance = nearest_first(line, shade)
        assert by_reward == by_distance
    # With the grey of the blank image all prefer shade 100, whatever the question: many preferences change.
    assert found["image_dependence_blank"]["value"] > 0.3
    assert found["image_dependence_shuffled"]["value"] > 0.3


def test_wrong_claims_are_counted_one_by_one(tmp_path, serve):
    # Against shades 10, 90, 170, 250 and a reach of 60: by hand, how many of the claims are wrong.
    responses = ("It has shade 0. It has shade 20.", "It has shade 0. It has shade 100.", "It has shade 200.")
    write_round(tmp_path, responses)
    judged(tmp_path, serve(by_rule), "claims")
    assert [line.rewards for line in score_lines(tmp_path)] == [
        [0.0, -1.0, -1.0],
        [-2.0, -1.0, -1.0],
        [-2.0, -2.0, 0.0],
        [-2.0, -2.0, 0.0],
    ]


def test_a_server_that_always_prefers_the_first_is_found_out(tmp_path, serve):
    write_round(tmp_path)
    found = judged(tmp_path, serve(always_first), "pairwise", prompt="pairwise_short")
    values = [found[name]["value"] for name in ("position_bias", "image_dependence", "consistency")]
    assert values == [1.0, 0.0, 0.0]
