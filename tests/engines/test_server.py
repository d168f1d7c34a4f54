"""The server engine against servers that misbehave: nothing lost, nothing twice, and it is said what was wrong."""

import base64
import io
import json
import logging
import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from align.config import Server, ServerSettings, build_config
from align.engines.base import FurtherSamples, SampleRequest, SamplingSettings
from align.engines.open import named_for_round, open_servers
from align.engines.server.chat import sample_seed
from align.errors import UserError
from reward.judge_model import BranchedPrompt
from tests.engines.conftest import collect
from tests.engines.stub_server import KEY, MODEL, Reply, StubServer, completion, question_text, said
from tests.patience import PATIENCE_S

SETTINGS = SamplingSettings(temperature=1.0, max_new_tokens=16)
FAST = ServerSettings(backoff_s=0.01, cooldown_s=0.05, timeout_s=PATIENCE_S, concurrency=4)


@pytest.fixture
def serve():
    """Start stub servers that end with the test."""
    started = []

    def start(**how):
        started.append(StubServer(**how))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def engine_on(*servers, settings=FAST, model=MODEL, api_key_env=None, open_image=lambda image: image, **changes):
    named = [
        Server(url=server if isinstance(server, str) else server.url, api_key_env=api_key_env) for server in servers
    ]
    return open_servers(named, model, settings.model_copy(update=changes), open_image=open_image)


def ask_for(number, *, images=(), num_samples=3):
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": f"Question {number}?"}]
    return SampleRequest(f"q{number}", [{"role": "user", "content": content}], tuple(images), num_samples, 100 * number)


def expected(request):
    return tuple(
        f"{request.messages[0]['content'][-1]['text']} -> {sample_seed(request.seed, index)}"
        for index in range(request.num_samples)
    )


def fail_first(reply, times=1):
    """Every question's first requests get this reply."""
    seen: dict[str, int] = {}
    lock = threading.Lock()

    def behave(body, count):
        with lock:
            key = json.dumps(body["messages"])[-200:] + str(body["seed"])
            seen[key] = seen.get(key, 0) + 1
            return reply if seen[key] <= times else None

    return behave


def test_n_samples_come_in_one_request_with_the_settings_asked_for(serve):
    server = serve()
    (result,) = collect(engine_on(server), [ask_for(1)], SETTINGS).values()
    assert result.texts == expected(ask_for(1))
    (body,) = server.asked
    assert (body["n"], body["seed"], body["max_tokens"], body["top_k"], body["top_p"]) == (3, 100, 16, -1, 1.0)
    assert result.finish_reasons == ("stop",) * 3


def test_a_server_that_ignores_n_is_asked_one_by_one_with_the_same_seeds(serve):
    requests = [ask_for(number) for number in range(5)]
    one_by_one, at_once = serve(has_n=False), serve()
    first = collect(engine_on(one_by_one), requests, SETTINGS)
    assert one_by_one.num_requests == 15
    second = collect(engine_on(at_once), requests, SETTINGS)
    assert at_once.num_requests == 5
    assert {id_: result.texts for id_, result in first.items()} == {id_: result.texts for id_, result in second.items()}
    assert first["q1"].num_tokens == tuple(map(len, first["q1"].texts))


@pytest.mark.parametrize("has_n", [True, False])
def test_further_samples_are_the_next_ones_of_the_seed_at_their_own_temperature(serve, has_n):
    server = serve(has_n=has_n)
    found = []
    further = FurtherSamples(lambda result: min(2, 6 - len(result.texts)), temperature=1.5)
    engine_on(server).sample([ask_for(1, num_samples=3)], SETTINGS, found.append, further=further)
    assert found[0].texts == expected(ask_for(1, num_samples=6))
    asked = [(body["seed"], body["temperature"], body.get("n", 1)) for body in server.asked]
    if has_n:
        assert asked == [(100, 1.0, 3), (103, 1.5, 2), (105, 1.5, 1)]
    else:
        assert sorted(asked) == [(100 + index, 1.0 if index < 3 else 1.5, 1) for index in range(6)]


def test_a_greedy_response_is_asked_for_before_the_samples(serve):
    server = serve(has_n=True)
    found = []
    engine_on(server).sample([ask_for(1, num_samples=3)], replace(SETTINGS, greedy_first=True), found.append)
    assert len(found[0].texts) == 4
    assert found[0].texts[1:] == expected(ask_for(1, num_samples=3))
    assert [(body["temperature"], body.get("n", 1)) for body in server.asked] == [(0.0, 1), (1.0, 3)]


@pytest.mark.parametrize("given", [1, 2, 5])
def test_a_wrong_number_of_choices_is_noticed_and_mended(serve, given):
    def too_few(body, count):
        return Reply(completion([said(body, index) for index in range(given)])) if body.get("n") == 3 else None

    server = serve(behave=too_few)
    found = collect(engine_on(server), [ask_for(number) for number in range(4)], SETTINGS)
    assert {result.texts for result in found.values()} == {expected(ask_for(number)) for number in range(4)}


BROKEN = {
    "429": Reply({"error": {"message": "slow down"}}, 429, {"Retry-After": "0"}),
    "500": Reply({"error": {"message": "cuda error"}}, 500),
    "plain text 503": Reply(b"<html>upstream is down</html>", 503),
    "truncated JSON": Reply(b'{"choices": [{"index": 0, "mess'),
    "shorter than claimed": Reply(b'{"choices": []}', claim_bytes=1000),
    "not JSON": Reply(b"Hello there."),
    "no choices": Reply({"object": "chat.completion", "choices": []}),
    "no messages": Reply({"choices": [{"index": 0}]}),
    "messages that are words": Reply({"choices": ["hello", "there"]}),
    "content that is no text": Reply(
        {"choices": [{"index": 0, "message": {"content": [{"type": "text", "text": "a"}]}}]}
    ),
    "log-probabilities in a list": Reply(completion(["half of"], logprobs=[-0.5])),
    "usage in a list": Reply(completion(["half of"]) | {"usage": [7, 7]}),
    "an error with status 200": Reply({"error": {"message": "oops"}}),
    "aborted": Reply(completion(["half of"], finish_reason="abort")),
    "dropped connection": Reply(None, drop=True),
}


@pytest.mark.parametrize("reply", BROKEN.values(), ids=BROKEN.keys())
def test_what_can_heal_is_tried_again_and_every_question_is_answered_once(serve, reply):
    server = serve(behave=fail_first(reply))
    requests = [ask_for(number) for number in range(6)]
    found = collect(engine_on(server), requests, SETTINGS)
    assert {request.id: expected(request) for request in requests} == {id_: r.texts for id_, r in found.items()}
    assert server.num_requests >= 12


def test_a_request_that_hangs_is_given_up_after_the_timeout_and_sent_again(serve):
    answered = threading.Event()

    def hang_once(body, count):
        if count == 1:
            answered.wait()

    server = serve(behave=hang_once)
    started = time.monotonic()
    # Were the first request waited for, this would never end.
    found = collect(engine_on(server, timeout_s=2.0), [ask_for(1)], SETTINGS)
    assert time.monotonic() - started >= 2.0
    answered.set()
    assert found["q1"].texts == expected(ask_for(1))


def test_an_answer_that_trickles_in_is_bounded_by_the_timeout_too(serve):
    whole = completion(["a long answer"])
    server = serve(behave=lambda body, count: Reply(whole, trickle_s=1.0))
    started = time.monotonic()
    with pytest.raises(UserError, match=r"q1: .*no answer within 0.2 s \(2 tries\)"):
        collect(engine_on(server, timeout_s=0.2, max_attempts=2), [ask_for(1)], SETTINGS)
    assert time.monotonic() - started < len(json.dumps(whole))


def test_retry_after_is_waited_for(serve):
    times = []

    def busy_once(body, count):
        times.append(time.monotonic())
        return Reply({"error": "busy"}, 429, {"Retry-After": "1"}) if count == 1 else None

    collect(engine_on(serve(behave=busy_once)), [ask_for(1)], SETTINGS)
    assert times[1] - times[0] >= 1.0


def test_a_rest_that_outlasts_its_work_ends_in_the_next(serve):
    busy_first = serve(behave=lambda body, count: Reply({}, 429, {"Retry-After": "1"}) if count == 1 else None)
    engine = engine_on(busy_first, max_attempts=1)
    branched = BranchedPrompt((), None, "Judge.", (("a",),), "", ())
    answers = []

    def judge_twice():
        answers.extend(engine.generate([branched], max_new_tokens=4)[0] for _ in range(2))

    work = threading.Thread(target=judge_twice, daemon=True)
    work.start()
    work.join(timeout=PATIENCE_S)
    assert answers == [[None], ["Judge.a -> 0"]]


def test_tries_are_bounded_and_the_question_and_its_fault_are_named_while_others_are_kept(serve):
    def always(body, count):
        return Reply({"error": {"message": "poisoned"}}, 500) if "Question 3" in question_text(body) else None

    server = serve(behave=always)
    kept = {}
    engine = engine_on(server, max_attempts=4)
    with pytest.raises(UserError) as failure:
        engine.sample([ask_for(n) for n in range(6)], SETTINGS, lambda result: kept.setdefault(result.id, result))
    assert "1 of 6 questions got no answer" in str(failure.value)
    assert "q3: " in str(failure.value)
    assert "500: poisoned (4 tries)" in str(failure.value)
    assert sorted(kept) == ["q0", "q1", "q2", "q4", "q5"]
    assert sum("Question 3" in question_text(body) for body in server.asked) == 4


def test_a_refused_image_is_not_tried_again_and_named(serve):
    def refuse(body, count):
        with_image = any("image_url" in part for part in body["messages"][-1]["content"])
        return Reply({"error": {"message": "this model takes no images"}}, 400) if with_image else None

    server = serve(behave=refuse)
    kept = {}
    with pytest.raises(UserError, match="q1: 400: this model takes no images"):
        engine_on(server).sample(
            [ask_for(0), ask_for(1, images=[Image.new("RGB", (9, 9))]), ask_for(2)],
            SETTINGS,
            lambda result: kept.setdefault(result.id, result),
        )
    assert sorted(kept) == ["q0", "q2"]
    assert server.num_requests == 3


def test_refused_questions_are_handed_over_where_a_stage_leaves_them_out(serve):
    def refuse(body, count):
        return Reply({"error": {"message": "too long"}}, 413) if "Question 3" in question_text(body) else None

    kept, refused = [], {}
    engine = engine_on(serve(behave=refuse))
    engine.sample([ask_for(n) for n in range(6)], SETTINGS, kept.append, on_unusable=refused.__setitem__)
    assert sorted(result.id for result in kept) == ["q0", "q1", "q2", "q4", "q5"]
    assert {id_: fault.reason for id_, fault in refused.items()} == {"q3": "a server refused it"}
    assert str(refused["q3"]) == "question q3: 413: too long"


def test_a_server_that_refuses_everything_ends_the_stage_also_where_refusals_are_left_out(serve):
    server = serve(behave=lambda body, count: Reply({"detail": "no images here"}, 422))
    with pytest.raises(UserError, match=r"none of the last 8 questions:\n(.*\n)*.*no images here"):
        engine_on(server).sample(
            [ask_for(n) for n in range(1000)], SETTINGS, lambda result: None, on_unusable=lambda id_, fault: None
        )
    assert server.num_requests < 20


def test_a_server_that_refuses_everything_is_not_asked_a_thousand_times(serve):
    server = serve(behave=lambda body, count: Reply({"detail": "no images here"}, 422))
    with pytest.raises(UserError, match=r"none of the last 8 questions:\n(.*\n)*.*no images here"):
        collect(engine_on(server), [ask_for(n) for n in range(1000)], SETTINGS)
    assert server.num_requests < 20


def test_a_server_that_breaks_for_good_in_the_middle_ends_the_run(serve):
    broken = Reply({"error": {"message": "cuda error"}}, 500)
    server = serve(behave=lambda body, count: broken if count > 10 else None)
    kept = {}
    with pytest.raises(UserError, match="none of the last 40 questions"):
        engine_on(server, max_attempts=1, cooldown_s=0.001).sample(
            [ask_for(n) for n in range(500)], SETTINGS, lambda result: kept.setdefault(result.id, result)
        )
    assert len(kept) == 10


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_are_in_flight_than_allowed(serve, concurrency):
    # Nobody is answered before so many are there.
    together = threading.Barrier(concurrency)
    server = serve(behave=lambda body, count: together.wait(PATIENCE_S) and None)
    collect(engine_on(server, concurrency=concurrency), [ask_for(n) for n in range(12)], SETTINGS)
    assert server.most_in_flight == concurrency


def test_results_do_not_depend_on_concurrency_or_the_number_of_endpoints(serve):
    requests = [ask_for(number) for number in range(10)]
    one = collect(engine_on(serve(), concurrency=1), requests, SETTINGS)
    many = collect(engine_on(serve(), serve(has_n=False), serve(), concurrency=5), requests, SETTINGS)
    assert {id_: result.texts for id_, result in one.items()} == {id_: result.texts for id_, result in many.items()}


def test_the_work_of_a_dying_endpoint_goes_to_the_other(serve, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="align")
    monkeypatch.setattr(logging.getLogger("align"), "propagate", True)
    # The other leaves work for it until it is gone.
    gone = threading.Event()
    dying, well = serve(), serve(behave=lambda body, count: gone.wait(PATIENCE_S) and None)

    def die(body, count):
        if count == 6:
            dying.http.dead = True
            threading.Thread(target=dying.stop).start()
            gone.set()

    dying.behave = die
    requests = [ask_for(number) for number in range(40)]
    engine = engine_on(dying, well)
    found = collect(engine, requests, SETTINGS)
    assert {request.id: expected(request) for request in requests} == {id_: r.texts for id_, r in found.items()}
    assert well.num_requests >= 34
    assert f"taken out: {dying.url}/v1" in caplog.text


def test_an_endpoint_comes_back_when_it_answers_a_check(serve):
    # The other leaves work for it until it is back.
    back = threading.Event()
    well = serve(behave=lambda body, count: back.wait(PATIENCE_S) and None)

    def fail_at_first(body, count):
        if count > 10:
            back.set()
        return Reply("", 500) if count <= 4 else None

    failing = serve(behave=fail_at_first)
    found = collect(engine_on(failing, well), [ask_for(number) for number in range(80)], SETTINGS)
    assert len(found) == 80
    assert failing.num_requests > 10


def test_when_all_are_dead_each_is_named_with_what_it_said_last(serve):
    servers = [serve(), serve()]
    for server in servers:
        server.behave = lambda body, count, mine=server: (
            threading.Thread(target=mine.stop).start() if count == 3 else None
        )
    kept = {}
    with pytest.raises(UserError) as failure:
        engine_on(*servers, max_attempts=10).sample(
            [ask_for(n) for n in range(100)], SETTINGS, lambda result: kept.setdefault(result.id, result)
        )
    assert "no server is left" in str(failure.value)
    for server in servers:
        assert re.search(f"{server.url}/v1: (cannot be reached|the connection broke)", str(failure.value))
    assert len(kept) >= 2


def test_a_server_that_starts_slowly_is_waited_for(serve):
    reserved = StubServer()
    port = reserved.port
    reserved.stop()
    threading.Timer(0.5, lambda: serve(port=port)).start()
    engine = engine_on(f"http://127.0.0.1:{port}", wait_s=PATIENCE_S)
    assert collect(engine, [ask_for(1)], SETTINGS)["q1"].texts == expected(ask_for(1))


def test_an_endpoint_that_is_down_at_the_start_is_no_reason_to_stop(serve):
    gone = StubServer()
    gone.stop()
    engine = engine_on(gone, serve())
    assert len(collect(engine, [ask_for(n) for n in range(5)], SETTINGS)) == 5


def test_a_model_that_is_not_served_is_refused_before_anything_is_asked(serve):
    server = serve(models=("policy-0", "other"))
    with pytest.raises(UserError, match=r"serves 'policy-0', 'other', not 'policy-1'"):
        engine_on(server, serve(models=("policy-1",)), model="policy-1")
    assert server.num_requests == 0


def test_the_only_model_of_a_server_needs_no_name(serve):
    server = serve(models=("critic-72b",))
    collect(engine_on(server, model=None), [ask_for(1)], SETTINGS)
    assert server.asked[0]["model"] == "critic-72b"


def test_a_model_that_vanishes_takes_the_endpoint_out(serve):
    server, other = serve(), serve(service_s=0.01)

    def swap(body, count):
        server.models = ("policy-2",)
        return

    server.behave = swap
    found = collect(engine_on(server, other), [ask_for(n) for n in range(20)], SETTINGS)
    assert len(found) == 20
    assert server.num_requests <= 4


def test_the_name_of_a_policy_must_tell_the_rounds_apart():
    server = Server(url="http://a", model="policy")
    assert named_for_round([server], 0)[0].model == "policy"
    with pytest.raises(UserError, match="same in every round"):
        named_for_round([server], 1)
    assert named_for_round([Server(url="http://a")], 3)[0].model is None


def test_the_key_comes_from_the_environment_and_is_never_shown(serve, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(logging.getLogger("align"), "propagate", True)
    monkeypatch.setenv("STUB_KEY", KEY + "\n")
    leak = Reply({"error": {"message": f"bad request by Bearer {KEY}"}}, 500)
    server = serve(key=KEY, behave=fail_first(leak))
    engine = engine_on(server, api_key_env="STUB_KEY")
    collect(engine, [ask_for(number) for number in range(4)], SETTINGS)
    server.behave = lambda body, count: Reply({"error": f"never: {KEY}"}, 400)
    with pytest.raises(UserError, match="never: ") as refused:
        collect(engine, [ask_for(9)], SETTINGS)
    server.key = "another"
    with pytest.raises(UserError, match="the key was refused") as denied:
        engine_on(server, api_key_env="STUB_KEY")
    shown = (
        caplog.text + str(refused.value) + str(denied.value) + json.dumps(engine.notes) + repr(engine.fleet.endpoints)
    )
    assert "[key]" in shown
    assert KEY not in shown


@pytest.mark.parametrize(("value", "message"), [("", "empty or not set"), ("sk-söcret key", "cannot be a key")])
def test_a_key_that_is_none_is_refused_by_the_name_of_its_variable(monkeypatch, value, message):
    monkeypatch.setenv("STUB_KEY", value)
    with pytest.raises(UserError, match=f"STUB_KEY .*{message}") as failure:
        engine_on("http://127.0.0.1:9", api_key_env="STUB_KEY")
    assert not value or value not in str(failure.value)


def test_a_key_in_the_url_is_refused_without_being_shown(tmp_path):
    for url in (f"http://me:{KEY}@host/v1", f"http://host/v1?key={KEY}"):
        data = {"policy": "p", "questions": "q.jsonl", "sample": {"servers": [url]}}
        with pytest.raises(UserError, match="api_key_env") as failure:
            build_config(data, base=tmp_path)
        assert KEY not in str(failure.value)


def test_the_settings_in_the_guide_are_understood(tmp_path):
    guide = Path(__file__).parents[2] / "docs" / "serving.md"
    block = re.search(r"```yaml\n(sample:\n  servers.*?)```", guide.read_text(), re.DOTALL)
    assert block is not None
    config = build_config({"policy": "p", "questions": "q"} | yaml.safe_load(block[1]), base=tmp_path)
    assert [server.model for server in named_for_round(config.sample.servers, 2)] == ["policy-2", "policy-2"]


def test_servers_may_be_urls_or_settings(tmp_path):
    servers = ["http://a:1", {"url": "http://b:1", "model": "m", "api_key_env": "K"}]
    config = build_config({"policy": "p", "questions": "q", "sample": {"servers": servers}}, base=tmp_path)
    assert [(server.url, server.model) for server in config.sample.servers] == [
        ("http://a:1", None),
        ("http://b:1", "m"),
    ]
    with pytest.raises(UserError, match="must begin with http"):
        build_config({"policy": "p", "questions": "q", "critic": {"servers": ["gpu1:8000"]}}, base=tmp_path)


@pytest.mark.parametrize(("image_format", "kind"), [("png", "PNG"), ("jpeg", "JPEG")])
def test_images_travel_as_data_uris_scaled_down_to_the_limit(serve, image_format, kind):
    server = serve()
    small, large = Image.new("RGB", (20, 10), (7, 99, 200)), Image.new("RGB", (400, 100))
    engine = engine_on(server, max_image_pixels=10_000, image_format=image_format)
    collect(engine, [ask_for(1, images=[small, large])], SETTINGS)
    parts = server.asked[0]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    opened = []
    for part in parts[:2]:
        head, data = part["image_url"]["url"].split(",")
        assert head == f"data:image/{image_format};base64"
        opened.append(Image.open(io.BytesIO(base64.b64decode(data))))
    assert [image.format for image in opened] == [kind, kind]
    assert [image.size for image in opened] == [(20, 10), (200, 50)]
    if kind == "PNG":
        assert opened[0].tobytes() == small.tobytes()
    assert engine.notes["images scaled down"] == "1"


def test_a_server_without_top_k_is_told_nothing_of_it_and_refused_where_it_is_wanted(serve):
    server = serve(has_extras=False)
    collect(engine_on(server), [ask_for(1)], SETTINGS)
    assert "top_k" not in server.asked[0]
    with pytest.raises(UserError, match="neither top_k"):
        collect(engine_on(server), [ask_for(1)], SamplingSettings(temperature=1.0, max_new_tokens=4, top_k=5))


def test_generated_judgements_that_are_refused_are_none_and_the_others_are_kept(serve):
    def refuse(body, count):
        return Reply({"error": {"message": "too long"}}, 400) if "bad" in question_text(body) else None

    engine = engine_on(serve(behave=refuse))
    prompts = [
        BranchedPrompt((), "Judge.", "Say: ", (("good",), ("bad",)), "!", ()),
        BranchedPrompt((), None, "Or: ", (("fine",),), "", ()),
    ]
    assert engine.generate(prompts, max_new_tokens=9) == [["Say: good! -> 0", None], ["Or: fine -> 0"]]
    assert engine.notes["judgements without an answer"] == "1"


def test_a_critic_that_refuses_all_judgements_stops_the_stage_with_its_words(serve):
    engine = engine_on(serve(behave=lambda body, count: Reply({"error": {"message": "no images"}}, 400)))
    prompts = [BranchedPrompt((), None, "The same instruction for all: ", (("a",),), "", ()) for _ in range(50)]
    with pytest.raises(UserError, match="no images"):
        engine.generate(prompts, max_new_tokens=4)


def test_without_httpx_the_extra_that_brings_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(UserError, match="pip install 'httpx"):
        engine_on("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("name", "value"),
    [("HTTP_PROXY", f"http://me:{KEY}/@proxy:1"), ("ALL_PROXY", "ftp://proxy"), ("SSL_CERT_FILE", "/nowhere.pem")],
)
def test_a_proxy_or_certificate_that_cannot_be_used_is_the_users_error(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=name) as failure:
        engine_on("http://127.0.0.1:9")
    assert KEY not in str(failure.value)


def test_an_address_that_is_none_is_the_users_error():
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:port"):
        engine_on("http://127.0.0.1:port")


def test_an_ask_goes_out_as_system_images_and_text(serve):
    server = serve()
    branched = BranchedPrompt((Image.new("RGB", (4, 4)),), "Judge.", "Say: ", (("a", "b"),), "!", ())
    engine_on(server).generate([branched], max_new_tokens=9)
    system, user = server.asked[0]["messages"]
    assert system == {"role": "system", "content": "Judge."}
    assert [part["type"] for part in user["content"]] == ["image_url", "text"]
    assert user["content"][1]["text"] == "Say: ab!"
    assert server.asked[0]["temperature"] == 0


def test_what_hangs_on_an_endpoint_that_is_taken_out_is_asked_again(serve):
    """The hung request would hold the one slot in which the endpoint is probed when it is back."""
    forever = threading.Event()

    def behave(body, count):
        if count == 1:
            forever.wait()
        # Not a single answer before it is out: one would count as a sign of life, whenever it came in between.
        return Reply(None, drop=True) if not endpoint.out_since else None

    requests = [ask_for(number) for number in range(6)]
    engine = engine_on(serve(behave=behave), timeout_s=3600.0, tries=20)
    (endpoint,) = engine.fleet.endpoints
    try:
        found = collect(engine, requests, SETTINGS)
    finally:
        forever.set()
    assert {id_: one.texts for id_, one in found.items()} == {one.id: expected(one) for one in requests}
