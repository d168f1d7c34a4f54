"""The KL divergence of a round from the first policy, as the evaluation estimates it."""

import itertools
import json
import shutil
import weakref

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaOnevisionForConditionalGeneration

from align.config import ModelSettings, load_config
from align.engines.base import GivenResponses
from align.engines.open import open_engine
from align.evaluation.evaluate import run_evaluate
from align.evaluation.kl import divergence
from align.evaluation.log_probs import OneModel
from align.monitoring.cost import cost_counter
from align.records import Evaluation, ResponseLogProbs, read_jsonl
from align.run.folder import RunDir
from tests.engines.prompt_reader import prompt_read
from tests.engines.stub_server import StubServer, completion
from tests.stage_runs import make_project, write_lines
from tests.tiny_models import llava_onevision_processor

TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose round 1 has a checkpoint near to the policy, not evaluated yet."""
    evaluate = {"questions": "eval.jsonl", "max_new_tokens": 6, "num_samples": 2, "temperature": TEMPERATURE}
    folder = make_project(tmp_path_factory.mktemp("project"), evaluate=evaluate, model={"dtype": "float32"})
    asked = [{"id": f"e{i}", "question": f"Well, {i}?", "images": [f"images/{i}.png"]} for i in range(4)]
    asked[2]["history"] = [{"role": "user", "content": "Look."}, {"role": "assistant", "content": "I do."}]
    write_lines(folder / "eval.jsonl", [*asked, {"id": "text", "question": "No image here?"}])
    this = RunDir(folder / "runs" / "run").round(1)
    shutil.copytree(folder / "policy", this.checkpoint)
    weights = load_file(this.checkpoint / "model.safetensors")
    torch.manual_seed(0)
    moved = {name: value + 0.05 * torch.randn_like(value) for name, value in weights.items()}
    save_file(moved, this.checkpoint / "model.safetensors", metadata={"format": "pt"})
    this.manifest.begin("dpo", settings={}, inputs={})
    this.manifest.finish("dpo", outputs=[], counts={})
    return folder


@pytest.fixture
def fresh(project, tmp_path):
    return shutil.copytree(project, tmp_path / "project")


def evaluated(folder, **changes):
    """Evaluate round 1 in this process; its files and what its manifest says."""
    values = yaml.safe_load((folder / "align.yaml").read_text())
    values["evaluate"] |= changes
    # A stub that is asked counts no tokens of a model's.
    values["server"] = {"compare_prompts": False}
    (folder / "align.yaml").write_text(yaml.safe_dump(values))
    this = RunDir(folder / "runs" / "run").round(1)
    with cost_counter(this.path, "evaluate"):
        run_evaluate(load_config(folder / "align.yaml"), 1)
    return this, json.loads(this.evaluation.read_text())["metrics"], this.manifest.stage("evaluate")


def known_tokens(model, response):
    """Up to a token that stands for an image: fed back in, it would ask for one."""
    places = {model.config.image_token_id, model.config.video_token_id}
    return list(itertools.takewhile(lambda token: token not in places, response.token_ids))


def log_prob(model, processor, folder, line, response):
    """One stock forward of one full sequence, at the temperature of the evaluation; in nats."""
    tokens = known_tokens(model, response)
    text = processor.apply_chat_template(line.question.messages(), add_generation_prompt=True, tokenize=False)
    images = [Image.open(folder / name) for name in line.question.images]
    inputs = processor(text=[text], return_tensors="pt", **({"images": [images]} if images else {}))
    start = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.int64)], dim=1)
    with torch.no_grad():
        logits = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0]
    log_p = (logits.double() / TEMPERATURE).log_softmax(dim=-1)
    return sum(float(log_p[start - 1 + i, token]) for i, token in enumerate(tokens))


def test_the_kl_is_that_of_stock_transformers_on_separate_sequences(fresh):
    this, metrics, stage = evaluated(fresh)
    processor = llava_onevision_processor()
    ours, first = (
        LlavaOnevisionForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        for path in (this.checkpoint, fresh / "policy")
    )
    lines = read_jsonl(this.evaluation_lines, Evaluation)
    nats = [
        log_prob(ours, processor, fresh, line, response) - log_prob(first, processor, fresh, line, response)
        for line in lines
        for response in line.sampled
    ]
    tokens = sum(len(known_tokens(ours, response)) for line in lines for response in line.sampled)
    assert len(nats) == 10
    assert metrics["kl"]["mean"] == pytest.approx(sum(nats) / 10, abs=1e-3)
    assert metrics["kl_per_token"]["mean"] == pytest.approx(sum(nats) / tokens, abs=1e-3)
    assert metrics["kl"]["low"] < metrics["kl"]["mean"] < metrics["kl"]["high"]
    assert metrics["kl"]["count"] == 5
    assert stage.notes["kl"] == "both policies at temperature 0.8, on the checkpoint's own samples"
    assert {"log-probs-own.jsonl", "log-probs-first.jsonl"} <= stage.outputs.keys()


def test_a_policy_has_no_distance_from_itself(fresh):
    this = RunDir(fresh / "runs" / "run").round(1)
    shutil.copy(fresh / "policy" / "model.safetensors", this.checkpoint)
    _, metrics, _ = evaluated(fresh)
    assert metrics["kl"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "count": 5}
    assert metrics["kl_per_token"]["mean"] == 0.0


def test_an_interrupted_evaluation_weighs_no_question_twice_and_ends_like_an_uninterrupted_one(fresh):
    this, whole, _ = evaluated(fresh)
    lines = {path: path.read_text().splitlines(keepends=True) for path in (this.own_log_probs, this.first_log_probs)}
    # As if it had been killed under the first policy: only two questions are weighed there.
    data = json.loads(this.manifest_path.read_text())
    data["stages"]["evaluate"]["status"] = "running"
    del data["checksum"]
    this.manifest_path.write_text(json.dumps(data))
    kept = this.evaluation_lines.read_text().replace('"greedy": {"text": "', '"greedy": {"text": "KEPT')
    (this.path / "evaluation.part-0.jsonl").write_text(kept)
    (this.path / "log-probs-own.part-0.jsonl").write_text("".join(lines[this.own_log_probs]))
    (this.path / "log-probs-first.part-0.jsonl").write_text("".join(lines[this.first_log_probs][:2]) + '{"id": "e2')
    this.first_log_probs.unlink()
    _, again, _ = evaluated(fresh)
    assert again["kl"] == whole["kl"]
    assert this.first_log_probs.read_text().splitlines(keepends=True) == lines[this.first_log_probs]
    assert all(line.greedy.text.startswith("KEPT") for line in read_jsonl(this.evaluation_lines, Evaluation))
    assert not list(this.path.glob("*.part-*"))


def test_on_servers_it_is_the_difference_of_what_they_find_of_the_prompts(fresh):
    """The checkpoint's server finds every token as likely as exp(-1), the first policy's as exp(-1.25)."""
    processor = llava_onevision_processor()
    tokens = [*processor.tokenizer.encode("a cup", add_special_tokens=False), processor.tokenizer.eos_token_id]

    def weighing(log_prob):
        def answer(body):
            if "prompt_logprobs" not in body:
                return completion(["a cup"] * body.get("n", 1), token_ids=tokens)
            ids = prompt_read(processor, body["messages"])
            entries = [None, *({str(token): {"logprob": log_prob}} for token in ids[1:])]
            return completion(["x"]) | {"prompt_token_ids": ids, "prompt_logprobs": entries}

        return answer

    ours = StubServer(models=("policy-1",), answer=weighing(-1.0))
    first = StubServer(models=("start",), answer=weighing(-1.25))
    try:
        _, metrics, stage = evaluated(
            fresh,
            temperature=1.0,
            servers=[{"url": ours.url, "model": "policy-{round}"}],
            first_policy_servers=[{"url": first.url, "model": "start"}],
        )
    finally:
        ours.stop()
        first.stop()
    assert metrics["kl"]["mean"] == pytest.approx(0.25 * len(tokens))
    assert metrics["kl_per_token"]["mean"] == pytest.approx(0.25)
    assert metrics["kl"]["count"] == 5
    assert stage.notes["kl"].startswith("both policies at temperature 1")
    assert {"log-probs-own.jsonl", "log-probs-first.jsonl"} <= stage.outputs.keys()


def test_a_served_policy_is_left_out_with_a_note(fresh):
    server = StubServer(models=("policy-1",))
    try:
        this, metrics, stage = evaluated(fresh, servers=[{"url": server.url, "model": "policy-{round}"}])
    finally:
        server.stop()
    assert "kl" not in metrics
    assert stage.notes["kl"] == "left out: no server has the first policy (evaluate.first_policy_servers)"
    assert not this.own_log_probs.exists()


def test_one_model_is_in_memory_at_a_time(fresh):
    alive, most = weakref.WeakSet(), []

    def opened(checkpoint):
        most.append(len(alive))
        engine = open_engine(
            checkpoint, ModelSettings(dtype="float32"), open_image=lambda name: Image.open(fresh / name)
        )
        alive.add(engine.model)
        return engine

    models = OneModel(opened)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    given = [GivenResponses("q", asked, ("images/0.png",), ((5, 6), (7,)))]
    for checkpoint in (fresh / "policy", fresh / "policy", fresh / "critic"):
        models.get(str(checkpoint)).loglikelihood(given, lambda *_: None)
    assert most == [0, 0]
    models.close()
    assert not alive


def test_it_can_be_switched_off(fresh):
    this, metrics, stage = evaluated(fresh, kl=False)
    assert "kl" not in metrics
    assert "kl" not in stage.notes
    assert not any(
        response.token_ids for line in read_jsonl(this.evaluation_lines, Evaluation) for response in line.sampled
    )


def test_nats_are_averaged_over_responses_and_over_tokens_and_impossible_responses_are_left_out():
    def of(*values):
        return [ResponseLogProbs(id=f"q{i}", log_probs=list(row), num_tokens=[2, 4]) for i, row in enumerate(values)]

    own, first = of((-1.0, -2.0), (-3.0, -4.0)), of((-2.0, -2.0), (float("-inf"), -7.0))
    found = divergence(own, first)
    # Differences 1, 0 and 3 nats over 2, 4 and 4 tokens.
    assert found["kl"].mean == pytest.approx(4 / 3)
    assert found["kl_per_token"].mean == pytest.approx(4 / 10)
    assert divergence(of((float("-inf"),) * 2), of((-1.0, -1.0))) == {}
