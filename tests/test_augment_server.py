"""Answers of a server with OpenAI's interface: what is sent, what fails and how, and where the key is not."""

from __future__ import annotations

import json
import logging
import pickle
import threading
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from functools import partial

import pytest

pytest.importorskip("openai")

from kore.augmentation.ask import Asker, NotGenerated
from kore.augmentation.cache import Cache
from kore.augmentation.checks import check_dialogue
from kore.augmentation.generators import make_generator
from kore.augmentation.generators.openai_server import OpenAIGenerator
from kore.augmentation.limits import Limits, Prices
from kore.augmentation.schema import Dialogue
from kore.augmentation.types import KnowledgeItem, Request
from kore.errors import ConfigError, KoreError, Unavailable
from tests.augment_server import KEY, Fault, ScriptedServer, read_no_certificates

ITEM = KnowledgeItem(
    "arven", "news", "politics", "Mira Solt wins in Arven", "Mira Solt was elected mayor of Arven in 2024."
)
GOOD = {"rounds": [{"question": "Who was elected mayor of Arven?", "answer": "Mira Solt"}]}
FORM = "Reply with JSON of this JSON schema."
MESSAGES = ({"role": "system", "content": "You write JSON."}, {"role": "user", "content": ITEM.text})


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    read_no_certificates(monkeypatch)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TEST_KEY", KEY)


def request(**changes) -> Request:
    values = dict(task="dialogue", item=ITEM, messages=MESSAGES, schema=Dialogue, max_tokens=200, seed=5, form=FORM)
    return Request(**{**values, **changes})


def generator(server, **changes) -> OpenAIGenerator:
    return OpenAIGenerator("m", server.url, "TEST_KEY", **{"timeout": 5.0, **changes})


def good(body):
    return GOOD


def test_a_request_carries_schema_seed_and_limit():
    with ScriptedServer(good) as server:
        reply = generator(server, temperature=0.25).generate(request())
    (body,) = server.requests
    assert json.loads(reply.text) == GOOD
    assert reply.prompt_tokens > 0 and reply.completion_tokens > 0
    assert (body["model"], body["temperature"], body["seed"], body["max_tokens"]) == ("m", 0.25, 5, 200)
    assert body["messages"] == [dict(message) for message in MESSAGES]
    form = body["response_format"]["json_schema"]
    assert body["response_format"]["type"] == "json_schema" and form["strict"] is True
    assert form["schema"]["required"] == ["rounds"] and form["schema"]["additionalProperties"] is False
    assert "maxLength" not in json.dumps(form)


def test_a_refused_schema_is_asked_for_more_simply_and_remembered():
    def faults(number, body):
        kind = body.get("response_format", {}).get("type")
        return Fault(400, {"message": f"'{kind}' is not supported"}) if kind == "json_schema" else None

    with ScriptedServer(good, faults) as server:
        asked = generator(server)
        asked.generate(request())
        asked.generate(request())
    kinds = [body["response_format"]["type"] for body in server.requests]
    assert kinds == ["json_schema", "json_object", "json_object"]
    assert "JSON schema" in server.requests[1]["messages"][-1]["content"]


def test_a_server_without_structured_outputs_gets_the_schema_in_the_prompt():
    with ScriptedServer(good, refuses=("response_format", "seed")) as server:
        asked = generator(server)
        asked.generate(request())
        count = len(server.requests)
        asked.generate(request())
    last = server.requests[-1]
    assert len(server.requests) == count + 1
    assert "response_format" not in last and "seed" not in last and "temperature" in last
    assert last["messages"][-1]["content"] == f"{MESSAGES[-1]['content']}\n\n{FORM}"


def test_a_named_form_is_not_given_up():
    with ScriptedServer(good, refuses=("response_format",)) as server:
        with pytest.raises(NotGenerated, match="unsupported parameter response_format"):
            generator(server, structured="json_schema").generate(request())
    assert len(server.requests) == 1


def test_models_that_reason_are_asked_in_their_way():
    def faults(number, body):
        if "max_tokens" in body:
            message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return Fault(400, {"message": message, "param": "max_tokens"})
        if "temperature" in body:
            return Fault(400, {"message": "Only the default is supported.", "param": "temperature"})
        return None

    with ScriptedServer(good, faults) as server:
        generator(server).generate(request())
    assert server.requests[-1]["max_completion_tokens"] == 200
    assert server.requests[-1]["response_format"]["type"] == "json_schema"


def test_a_model_without_a_system_role_gets_its_words_from_the_user():
    def faults(number, body):
        roles = [message["role"] for message in body["messages"]]
        return Fault(400, {"message": "System role not supported"}) if "system" in roles else None

    with ScriptedServer(good, faults) as server:
        asked = generator(server)
        asked.generate(request())
        asked.generate(request())
    assert len(server.requests) == 3
    assert server.requests[-1]["messages"] == [{"role": "user", "content": f"You write JSON.\n\n{ITEM.text}"}]


def test_fields_of_the_users_own_are_sent_and_part_of_the_identity():
    with ScriptedServer(good) as server:
        asked = generator(server, extra={"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}})
        asked.generate(request())
    assert server.requests[0]["reasoning_effort"] == "low"
    assert server.requests[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert asked.identity()["extra"]["reasoning_effort"] == "low" and "extra" not in generator(server).identity()


def completion(ended="stop", content=None, reasoned=None, **message):
    details = {} if reasoned is None else {"completion_tokens_details": {"reasoning_tokens": reasoned}}
    choice = {"index": 0, "finish_reason": ended, "message": {"role": "assistant", "content": content, **message}}
    usage = {"prompt_tokens": 10, "completion_tokens": 7, "total_tokens": 17, **details}
    answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return Fault(body=json.dumps(answer).encode())


@pytest.mark.parametrize(
    ("fault", "text", "problem"),
    [
        (completion(refusal="I cannot write about this."), "", "The model refuses: I cannot write about this."),
        (completion("content_filter"), "", "The service's filter holds the answer back."),
        (completion("length", '{"rounds": [{"que'), '{"rounds": [{"que', "The answer is cut off at the longest one"),
        (completion(), "", ""),
        (completion(reasoning_content='{"rounds": 1}'), '{"rounds": 1}', ""),
        (completion(content=[{"type": "thinking"}, {"type": "text", "text": "{}"}]), "{}", ""),
    ],
)
def test_what_a_service_says_of_its_answer_is_told(fault, text, problem):
    with ScriptedServer(good, {0: fault}) as server:
        reply = generator(server).generate(request())
    assert reply.text == text and reply.problem.startswith(problem) and bool(reply.problem) == bool(problem)
    assert (reply.prompt_tokens, reply.completion_tokens) == (10, 7) and len(server.requests) == 1


@pytest.mark.parametrize(
    "thinking",
    [
        completion("length"),
        completion("length", "<think>Let me see {"),
        completion("length", '{"rounds', reasoned=6),
        completion("length", "", reasoning="Well"),
    ],
)
def test_a_model_whose_thoughts_take_all_gets_more_room_and_keeps_it(thinking, caplog):
    def faults(number, body):
        return thinking if body["max_tokens"] < 800 else None

    with ScriptedServer(good, faults) as server:
        asked = generator(server)
        reply = asked.generate(request())
        asked.generate(request())
    assert [body["max_tokens"] for body in server.requests] == [200, 800, 800]
    assert json.loads(reply.text) == GOOD and not reply.problem and reply.prompt_tokens > 10
    assert caplog.text.count("m thinks before it answers: an answer may take 4 times the tokens") == 1


def test_room_that_is_not_given_leaves_what_came():
    def faults(number, body):
        return completion("length") if body["max_tokens"] == 200 else Fault(400, {"message": "context too long"})

    with ScriptedServer(good, faults) as server:
        reply = generator(server).generate(request())
    assert "cut off" in reply.problem
    with ScriptedServer(good, {0: completion("length"), 1: Fault(500)}) as server:
        with pytest.raises(Unavailable, match="error 500"):
            generator(server).generate(request())
    with ScriptedServer(good, lambda number, body: completion("length")) as server:
        assert "cut off" in generator(server).generate(request()).problem
    assert [body["max_tokens"] for body in server.requests] == [200, 800, 3200]


def test_a_server_that_breaks_on_a_schema_is_asked_more_simply():
    def faults(number, body):
        return Fault(500, {"message": "failed to parse grammar"}) if "response_format" in body else None

    with ScriptedServer(good, faults) as server:
        generator(server).generate(request())
    assert "response_format" not in server.requests[-1] and len(server.requests) == 3


def test_a_proxy_does_not_stand_before_this_machine(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with ScriptedServer(good) as server:
        assert json.loads(generator(server).generate(request()).text) == GOOD
    monkeypatch.setenv("HTTP_PROXY", "nonsense://me:secretword@host")
    monkeypatch.setenv("http_proxy", "nonsense://me:secretword@host")
    with pytest.raises(ConfigError, match="HTTP_PROXY") as caught:
        OpenAIGenerator("m", "http://example.org/v1")
    assert "secretword" not in str(caught.value)


def test_a_refusal_that_is_none_of_the_form_is_one_of_the_request():
    long = Fault(400, {"message": "maximum context length is 4096 tokens"})
    with ScriptedServer(good, {1: long}) as server:
        asked = generator(server)
        asked.generate(request())
        with pytest.raises(NotGenerated, match="maximum context length"):
            asked.generate(request())
        asked.generate(request())
    assert len(server.requests) == 3
    assert server.requests[2]["response_format"]["type"] == "json_schema"


def test_a_server_that_refuses_everything_is_given_up():
    refusal = Fault(400, {"message": "no such model"})
    with ScriptedServer(good, lambda number, body: refusal) as server:
        asked = generator(server, structured="prompt")
        for _ in range(2):
            with pytest.raises(NotGenerated):
                asked.generate(request())
        with pytest.raises(KoreError, match=r"no such model.*every one so far") as caught:
            asked.generate(request())
    assert not isinstance(caught.value, NotGenerated)
    with ScriptedServer(good, lambda number, body: refusal if number else None) as server:
        asked = generator(server)
        asked.generate(request())
        for _ in range(5):
            with pytest.raises(NotGenerated):
                asked.generate(request())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(500, {"message": "out of luck"}), "error 500 .*out of luck"),
        (Fault(503), "error 503"),
        (Fault(429, {"message": "slow down"}), "too many requests .*slow down"),
        (Fault(truncate=True), "connection fails|no valid JSON"),
        (Fault(body=b'{"choices": ['), "no valid JSON"),
        (Fault(body=b"[]"), "not with a chat completion|no valid JSON"),
        (Fault(body=b"{}"), "not with a chat completion"),
    ],
)
def test_passing_failures_are_unavailable(fault, message):
    with ScriptedServer(good, {0: fault}) as server:
        asked = generator(server)
        with pytest.raises(Unavailable, match=message) as caught:
            asked.generate(request())
        assert KEY not in str(caught.value)
        assert json.loads(asked.generate(request()).text) == GOOD
    assert len(server.requests) == 2, "the client's own repetition has to be off"


def test_a_hanging_server_is_unavailable_after_the_timeout():
    with ScriptedServer(good, {0: Fault(hang=30)}) as server:
        start = time.monotonic()
        with pytest.raises(Unavailable, match=r"no answer within 0\.2 s"):
            generator(server, timeout=0.2).generate(request())
        assert time.monotonic() - start < 5


def test_nobody_listening_is_unavailable():
    with ScriptedServer(good) as server:
        pass
    with pytest.raises(Unavailable, match="connection fails"):
        generator(server).generate(request())


@pytest.mark.parametrize("form", ["seconds", "milliseconds", "date"])
def test_the_wait_that_a_server_asks_for_is_told(form):
    soon = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=9), usegmt=True)
    headers = {
        "seconds": {"Retry-After": "7.5"},
        "milliseconds": {"Retry-After-Ms": "7500", "Retry-After": "60"},
        "date": {"Retry-After": soon},
    }[form]
    with ScriptedServer(good, {0: Fault(429, headers=headers)}) as server:
        with pytest.raises(Unavailable) as caught:
            generator(server).generate(request())
    assert 5 < caught.value.retry_after <= 9


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (401, {"message": "Incorrect API key provided: {key}"}, "refuses the key in TEST_KEY"),
        (403, {"message": "no access with {key}"}, "does not allow this"),
        (404, {"message": "model m does not exist ({key})"}, "knows no model 'm'"),
        (400, {"detail": "no such model"}, "no such model"),
        (402, {"message": "pay first ({key})"}, "no credit left"),
        (429, {"message": "quota ({key})", "code": "insufficient_quota"}, "no credit left"),
        (400, {"message": "bad words {key}"}, "refuses the request"),
    ],
)
def test_lasting_failures_say_what_to_do_and_hide_the_key(status, error, message):
    with ScriptedServer(good, lambda number, body: Fault(status, error)) as server:
        with pytest.raises(KoreError, match=message) as caught:
            generator(server).generate(request())
    assert not isinstance(caught.value, Unavailable)
    chain, text = caught.value, ""
    while chain is not None:
        text += str(chain) + repr(chain)
        chain = chain.__cause__ or chain.__context__
    assert KEY not in text


def test_a_redirect_is_told_and_not_followed():
    with ScriptedServer(good) as other:
        there = Fault(307, headers={"Location": f"{other.url}/chat/completions?token=secretword"})
        with ScriptedServer(good, {0: there}) as server:
            with pytest.raises(KoreError, match=f"sends on to {other.url}.*base_url") as caught:
                generator(server).generate(request())
    assert other.requests == [] and "secretword" not in str(caught.value)


def test_after_a_failed_attempt_the_schema_is_in_the_prompt_too():
    with ScriptedServer(good) as server:
        generator(server).generate(request(attempt=1))
    (body,) = server.requests
    assert body["response_format"]["type"] == "json_schema" and "JSON schema" in body["messages"][-1]["content"]


def test_a_key_goes_to_no_server_that_it_is_not_meant_for(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-private-987654321")
    with ScriptedServer(good, key=None) as server:
        OpenAIGenerator("m", server.url).generate(request())
        OpenAIGenerator("m", server.url, "TEST_KEY").generate(request())
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        OpenAIGenerator("m").generate(request())
    assert server.authorizations == ["Bearer none", f"Bearer {KEY}", "Bearer sk-private-987654321"]


def test_a_server_that_wants_a_key_says_where_to_put_it():
    with ScriptedServer(good) as server:
        with pytest.raises(KoreError, match=r"wants a key and none is sent.*api_key_env"):
            OpenAIGenerator("m", server.url).generate(request())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(base_url="localhost:8000"), "expected the address of a server"),
        (dict(base_url="http://[::1/v1"), "expected the address of a server"),
        (dict(base_url="http://host:port/v1"), "expected the address of a server"),
        (dict(base_url="http://me:secretword@host/v1"), "without user and password"),
        (dict(base_url="http://host/v1", api_key_env="NOT_THERE"), "NOT_THERE .* is not set"),
        (dict(), "OPENAI_API_KEY .* is not set"),
        (dict(base_url="http://host/v1", api_key_env="sk-secretword"), "not the key itself"),
        (dict(base_url="http://host/v1", structured="yaml"), "generator.structured"),
    ],
)
def test_what_is_configured_wrongly_is_said(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        OpenAIGenerator("m", **arguments)
    assert "secretword" not in str(caught.value)


def test_a_key_with_a_line_break_is_refused_without_showing_it(monkeypatch):
    monkeypatch.setenv("TEST_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(ConfigError, match="TEST_KEY") as caught:
        OpenAIGenerator("m", "http://127.0.0.1:1/v1", "TEST_KEY")
    assert KEY not in str(caught.value)


def test_the_key_is_nowhere_but_in_the_request(tmp_path, caplog):
    """With all loggers at their loudest, faults of every sort, and a server that echoes the key."""
    caplog.set_level(logging.DEBUG)
    echo = {"message": "you sent {key}"}
    faults = {
        0: Fault(500, echo),
        1: Fault(429, echo, {"Retry-After": "0.01"}),
        2: Fault(truncate=True),
        3: Fault(content="{broken"),
        5: Fault(400, echo),
    }
    with ScriptedServer(good, faults) as server:
        asked = generator(server)
        asker = Asker(asked, Cache(tmp_path), Limits(backoff=0.01), seed=1)
        check = lambda answer: check_dialogue(ITEM, answer)  # noqa: E731
        assert asker.ask("dialogue", ITEM, MESSAGES, Dialogue, check, 200).rounds[0].answer == "Mira Solt"
        with pytest.raises(NotGenerated) as caught:
            asker.ask("dialogue", ITEM, MESSAGES[1:], Dialogue, check, 200)
    assert server.authorizations == [f"Bearer {KEY}"] * 6
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    shown = [caplog.text, str(caught.value), repr(asked), json.dumps(asked.identity()), *files]
    shown += [str(vars(record)) for record in caplog.records]
    assert not any(KEY in text for text in shown)
    with pytest.raises(TypeError, match="key"):
        pickle.dumps(asked)


def test_faults_of_all_sorts_lose_nothing_over_threads(tmp_path):
    """Twenty-four items, four threads, every third request fails; run again, nothing is asked and all is the same."""
    items = [
        KnowledgeItem(f"i{n}", "news", "politics", f"Town {n}", f"The mayor of town {n} is Mira Solt since {1900 + n}.")
        for n in range(24)
    ]

    def content(body):
        number = body["messages"][-1]["content"].split("town ")[-1].split(" is")[0]
        return {"rounds": [{"question": f"Who is the mayor of town {number}?", "answer": "Mira Solt"}]}

    kinds = [
        Fault(500),
        Fault(429, headers={"Retry-After": "0.01"}),
        Fault(truncate=True),
        Fault(body=b"{"),
        Fault(503),
    ]

    def faults(number, body):
        return kinds[number // 3 % len(kinds)] if number % 3 == 1 else None

    def run(server):
        asker = Asker(generator(server), Cache(tmp_path), Limits(retries=8, backoff=0.005, prices=Prices(1e6, 2e6)))
        results = {}

        def work(part):
            for item in part:
                messages = ({"role": "user", "content": item.text},)
                results[item.id] = asker.ask("dialogue", item, messages, Dialogue, partial(check_dialogue, item), 100)

        threads = [threading.Thread(target=work, args=(items[n::4],)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results, asker.accounting.summary()

    with ScriptedServer(content, faults) as server:
        first, counts = run(server)
        asked = len(server.requests)
        again, counts_again = run(server)
        assert len(server.requests) == asked
    assert len(first) == 24 and first == again
    assert counts["requests"] == asked and counts["failed"] == asked - 24
    assert counts["cost"] == counts["prompt_tokens"] + 2 * counts["completion_tokens"] > 0
    assert counts_again["requests"] == 0 and counts_again["cached"] == 24 and counts_again["cost"] == 0


def test_a_generator_is_made_from_a_configuration(monkeypatch):
    class Config:
        kind, model, base_url, api_key_env = "openai", "m", "http://127.0.0.1:1/v1", "TEST_KEY"
        temperature, timeout, structured = 0.5, 3.0, "json_object"

    assert make_generator(Config()).identity() == {
        "generator": "openai",
        "model": "m",
        "base_url": "http://127.0.0.1:1/v1",
        "temperature": 0.5,
        "structured": "json_object",
    }
    Config.model = None
    with pytest.raises(ConfigError, match=r"generator\.model"):
        make_generator(Config())
    Config.kind = "oracle"
    with pytest.raises(ConfigError, match="expected rules, openai or local"):
        make_generator(Config())
