"""Asking until an answer is accepted: repetition, what adds up, the cache, rate limits and accounting."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kore.augmentation.ask import Asker, NotGenerated
from kore.augmentation.cache import Cache
from kore.augmentation.limits import Accounting, Limits, Prices, RateLimiter, estimate_tokens
from kore.augmentation.schema import Caption, Dialogue, Questions, Round, json_schema, parse
from kore.augmentation.texts import load_texts
from kore.augmentation.types import KnowledgeItem, Reply
from kore.errors import KoreError, Unavailable

ITEM = KnowledgeItem("a", "entity", "city", "Arven", "Arven is a city.", facts={"founder": "Mira Solt"})
MESSAGES = ({"role": "user", "content": "Write about Arven."},)


class Scripted:
    """Gives its replies in turn: text, or an error to raise."""

    def __init__(self, *replies, name="scripted"):
        self.replies, self.requests, self.name = list(replies), [], name
        self.lock = threading.Lock()

    def identity(self):
        return {"name": self.name}

    def generate(self, request):
        with self.lock:
            self.requests.append(request)
            reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return Reply(reply if isinstance(reply, str) else json.dumps(reply), 100, 10)


class Time:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now, self.slept = 1000.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def rounds(*letters):
    return {"rounds": [{"question": f"What is letter {letter} in Arven?", "answer": letter} for letter in letters]}


def without(*bad):
    """A check that accepts all rounds but those whose answer is named."""

    def check(answer):
        good = [entry for entry in answer.rounds if entry.answer not in bad]
        reasons = [f"{entry.answer} is bad." for entry in answer.rounds if entry.answer in bad]
        return (Dialogue(rounds=tuple(good)) if good else None), reasons

    return check


def asker(tmp_path, *replies, name="scripted", time=None, limits=None, **changes):
    time = time or Time()
    generator = Scripted(*replies, name=name)
    limits = limits or Limits(clock=time, sleep=time.sleep)
    return Asker(generator, Cache(tmp_path / "cache"), limits, **changes), generator


def put(asked, check=lambda answer: (answer, []), messages=MESSAGES, item=ITEM, schema=Dialogue, max_tokens=50):
    return asked.ask("dialogue", item, messages, schema, check, max_tokens)


def answers(dialogue):
    return [entry.answer for entry in dialogue.rounds]


def test_a_good_answer_takes_one_request(tmp_path):
    asked, generator = asker(tmp_path, rounds("A", "B"))
    request = ("dialogue", ITEM, MESSAGES, Dialogue, 50)
    assert not asked.is_cached(*request)
    assert answers(put(asked)) == ["A", "B"]
    assert asked.is_cached(*request) and not asked.is_cached(*request[:-1], 51)
    assert [(request.attempt, request.max_tokens) for request in generator.requests] == [(0, 50)]


def test_what_is_wrong_is_told_and_what_is_right_adds_up(tmp_path):
    asked, generator = asker(tmp_path, "{oops", rounds("A", "bad", "B"), rounds("C"))
    assert answers(put(asked, without("bad"))) == ["A", "B", "C"]
    first, second, third = generator.requests
    assert first.messages == MESSAGES and second.messages[0] == MESSAGES[0]
    assert second.messages[1] == {"role": "assistant", "content": "{oops"}
    assert "not valid JSON" in second.messages[2]["content"]
    assert "bad is bad." in third.messages[2]["content"] and len(third.messages) == 3
    assert [request.attempt for request in generator.requests] == [0, 1, 2]
    assert len({request.seed for request in generator.requests}) == 3
    assert asked.accounting.summary()["rejected"] == 2


def test_what_a_service_says_of_its_answer_is_the_reason(tmp_path):
    class Refusing(Scripted):
        def generate(self, request):
            reply = super().generate(request)
            return Reply("", 3, 4, "The model refuses: no.") if not reply.text else reply

    generator = Refusing("", rounds("A"))
    asked = Asker(generator, Cache(tmp_path), Limits())
    assert answers(put(asked)) == ["A"]
    assert "- The model refuses: no." in generator.requests[1].messages[2]["content"]
    # From the cache too.
    again = Asker(Refusing(), Cache(tmp_path), Limits(), attempts=1)
    with pytest.raises(NotGenerated, match=r"The model refuses: no\."):
        put(again)


@pytest.mark.parametrize(
    "thoughts",
    [
        '<think>Maybe {"rounds": []}?</think>',
        'The template has begun them. {"rounds": []}</think>',
        "[THINK]{}[/THINK]",
        "<thinking>a</thinking><reasoning>{</reasoning>",
    ],
)
def test_thoughts_are_no_answer_and_are_not_sent_back(thoughts, tmp_path):
    asked, generator = asker(tmp_path, f"{thoughts}\n```json\n{json.dumps(rounds('bad', 'A'))}\n```", rounds("B"))
    assert sorted(answers(put(asked, without("bad")))) == ["A", "B"]
    said = generator.requests[1].messages[1]["content"]
    assert said.startswith("```json") and "THINK" not in said.upper()


def test_thoughts_without_end_hold_no_answer():
    answer, reasons = parse(f"<think>Perhaps {json.dumps(rounds('A'))} or", Dialogue)
    assert answer is None and reasons == ["The reply is empty; JSON is expected."]
    told = {"rounds": [{"question": "What does </think> end?", "answer": "Thoughts"}]}
    assert answers(parse(json.dumps(told), Dialogue)[0]) == ["Thoughts"]


def test_what_a_model_is_told_is_in_files_of_the_users(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "answers.yaml").write_text("form: 'As {schema}!'\nrepair: 'No: {reasons}'\n")
    asked, generator = asker(tmp_path, "{oops", rounds("A"), texts=load_texts(texts))
    put(asked)
    assert generator.requests[0].form.startswith('As {"') and generator.requests[0].form.endswith("}!")
    assert generator.requests[1].messages[2]["content"].startswith("No: - The reply is not valid JSON")
    other, _ = asker(tmp_path)
    assert not other.is_cached("dialogue", ITEM, MESSAGES, Dialogue, 50)


def test_a_complete_answer_is_not_asked_for_again(tmp_path):
    asked, generator = asker(tmp_path, rounds(*"ABCDEFGHI", "bad"), rounds(*"JKL", "bad"))
    assert answers(put(asked, without("bad"))) == list("ABCDEFGHIJ")
    assert len(generator.requests) == 2


def test_what_was_accepted_is_kept_when_the_attempts_end(tmp_path):
    asked, generator = asker(tmp_path, rounds("A", "bad"), "nothing", rounds("bad"))
    assert answers(put(asked, without("bad"))) == ["A"]
    assert len(generator.requests) == 3


def test_the_same_bad_reply_twice_is_not_taken_for_the_cached_one(tmp_path):
    asked, generator = asker(tmp_path, rounds("bad"), rounds("bad"), rounds("A"))
    assert answers(put(asked, without("bad"))) == ["A"]
    assert generator.requests[1].messages == generator.requests[2].messages


def test_nothing_acceptable_is_an_error_with_the_last_reasons(tmp_path):
    asked, _ = asker(tmp_path, "", rounds("bad"), attempts=2)
    with pytest.raises(NotGenerated, match=r"2 replies were not acceptable, at last: bad is bad\.") as caught:
        put(asked, without("bad"))
    assert caught.value.reasons == ("bad is bad.",)


def test_a_caption_is_replaced_and_not_joined(tmp_path):
    captions = [{"depicted": "a city", "summary": text} for text in ("first", "second")]
    asked, _ = asker(tmp_path, *captions)
    check = lambda answer: (answer, ["Shorter."] if answer.summary == "first" else [])  # noqa: E731
    assert put(asked, check, schema=Caption).summary == "second"


def test_running_again_asks_nothing_and_ends_the_same(tmp_path):
    script = ["{oops", rounds("A", "bad"), rounds("C", "bad")]
    asked, _ = asker(tmp_path, *script)
    first = put(asked, without("bad"))
    files = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.json")}
    again, generator = asker(tmp_path)
    assert put(again, without("bad")) == first and generator.requests == []
    assert files == {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.json")} and len(files) == 3
    assert again.accounting.summary()["cached"] == 3 and again.accounting.requests == 0


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=1),
        dict(name="another"),
        dict(messages=({"role": "user", "content": "Other."},)),
        dict(item=KnowledgeItem("a", "entity", "city", "Arven", "Arven is a town.")),
        dict(max_tokens=51),
    ],
)
def test_what_an_answer_depends_on_is_in_the_key(tmp_path, change):
    asked, _ = asker(tmp_path, rounds("A"))
    put(asked)
    making = {name: change[name] for name in change if name in ("seed", "name")}
    asking = {name: change[name] for name in change if name not in making}
    other, generator = asker(tmp_path, rounds("B"), **making)
    assert answers(put(other, **asking)) == ["B"] and len(generator.requests) == 1


def test_an_item_that_moved_finds_its_answer(tmp_path):
    asked, _ = asker(tmp_path, rounds("A"))
    put(asked)
    moved = KnowledgeItem(**{**vars(ITEM), "id": "b", "source": "other.jsonl:7", "image": tmp_path / "x.png"})
    other, generator = asker(tmp_path)
    assert answers(put(other, item=moved)) == ["A"] and not generator.requests


def test_a_generator_can_decline_the_cache(tmp_path):
    asked, generator = asker(tmp_path, rounds("A"), rounds("B"))
    generator.cached = False
    asked = Asker(generator, asked.cache, asked.limits)
    assert answers(put(asked)) == ["A"] and answers(put(asked)) == ["B"]
    assert not (tmp_path / "cache").exists()


def test_threads_with_the_same_request_ask_once(tmp_path):
    started, release = threading.Event(), threading.Event()

    class Slow(Scripted):
        def generate(self, request):
            started.set()
            release.wait(5)
            return super().generate(request)

    generator = Slow(rounds("A"), rounds("B"))
    asked = Asker(generator, Cache(tmp_path), Limits())
    results = []
    threads = [threading.Thread(target=lambda: results.append(answers(put(asked)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert started.wait(5)
    release.set()
    for thread in threads:
        thread.join()
    assert results == [["A"]] * 4 and len(generator.requests) == 1 and asked._in_flight == {}


def test_passing_failures_are_waited_out_with_growing_delays(tmp_path):
    time = Time()
    asked, generator = asker(tmp_path, *[Unavailable("busy")] * 3, rounds("A"), time=time)
    assert answers(put(asked)) == ["A"]
    for retry, slept in enumerate(time.slept):
        assert 0.5 * 2**retry <= slept <= 2**retry
    counts = asked.accounting.summary()
    assert (counts["requests"], counts["failed"], counts["prompt_tokens"]) == (4, 3, 100)
    assert counts["waited_seconds"] == pytest.approx(sum(time.slept), abs=1e-3) and len(time.slept) == 3
    assert len({request.seed for request in generator.requests}) == 1
    repeated = Time()
    put(asker(tmp_path / "b", *[Unavailable("busy")] * 3, rounds("A"), time=repeated)[0])
    assert repeated.slept == time.slept
    other = Time()
    put(asker(tmp_path / "c", *[Unavailable("busy")] * 3, rounds("A"), time=other, seed=1)[0])
    assert other.slept != time.slept


def test_a_failure_that_does_not_pass_is_raised_and_nothing_is_cached(tmp_path):
    time = Time()
    asked, generator = asker(
        tmp_path, *[Unavailable("busy")] * 9, limits=Limits(retries=2, sleep=time.sleep, clock=time)
    )
    with pytest.raises(Unavailable, match=r"busy \(tried 3 times\).*run it again"):
        put(asked)
    assert len(generator.requests) == 3 and not (tmp_path / "cache").exists()


def test_a_lasting_failure_is_raised_at_once(tmp_path):
    asked, generator = asker(tmp_path, KoreError("wrong key"), rounds("A"))
    with pytest.raises(KoreError, match="wrong key"):
        put(asked)
    assert len(generator.requests) == 1 and asked.accounting.failed == 1


def test_the_wait_that_is_asked_for_holds_all_requests_up():
    time = Time()
    limits = Limits(clock=time, sleep=time.sleep)
    busy = Unavailable("busy")
    busy.retry_after = 30.0
    outcomes = [busy, "done"]

    def answer():
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert limits.call(answer, name="x") == "done" and sum(time.slept) >= 30
    busy.retry_after = 121.0
    outcomes[:] = [busy]
    with pytest.raises(Unavailable, match="asks to wait 121 s, longer than the 120 s allowed"):
        limits.call(answer, name="x")
    busy.retry_after = 12.0
    outcomes[:] = [busy, "other"]
    time.slept.clear()
    limits.retries = 0
    with pytest.raises(Unavailable):
        limits.call(answer, name="x")
    assert limits.call(answer, name="y") == "other" and time.slept == [pytest.approx(12.0)]


def test_stop_ends_the_waits():
    limits = Limits(requests_per_minute=1)
    limits.call(lambda: None, name="a")
    caught = []

    def wait():
        try:
            limits.call(lambda: None, name="b")
        except Unavailable as error:
            caught.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    limits.stop()
    thread.join(5)
    assert not thread.is_alive() and "stopped" in caught[0]


@settings(max_examples=60, deadline=None)
@given(
    requests=st.integers(1, 6),
    tokens=st.integers(10, 100),
    load=st.lists(st.tuples(st.integers(0, 60), st.floats(0, 40)), max_size=40),
)
def test_no_minute_holds_more_than_the_limits(requests, tokens, load):
    time = Time()
    limiter = RateLimiter(requests, tokens, time)
    starts = []
    for wanted, pause in load:
        time.now += pause
        wait, _ = limiter.reserve(wanted)
        assert wait >= 0
        starts.append((time.now + wait, wanted))
    times = [start for start, _ in starts]
    assert times == sorted(times)
    for begin, _ in starts:
        within = [min(wanted, tokens) for start, wanted in starts if begin <= start < begin + 60 - 1e-6]
        assert len(within) <= requests and sum(within) <= tokens


def test_the_limiter_does_not_wait_without_need():
    time = Time()
    limiter = RateLimiter(3, 100, time)
    assert [limiter.reserve(10)[0] for _ in range(4)] == [0, 0, 0, 60]
    time.now += 121
    _, place = limiter.reserve(90)
    limiter.correct(place, 20)
    assert limiter.reserve(80)[0] == 0
    assert RateLimiter(0.5, None, time).reserve()[0] == 0
    with pytest.raises(KoreError, match="more than 0"):
        RateLimiter(0, None, time)


def test_counts_of_many_threads_add_up():
    accounting = Accounting(Prices(2.0, 4.0))
    threads = [
        threading.Thread(target=lambda: [accounting.add(requests=1, prompt_tokens=3) for _ in range(2000)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    accounting.add(completion_tokens=1_000_000)
    assert accounting.requests == 8000 and accounting.prompt_tokens == 24000
    assert accounting.summary()["cost"] == pytest.approx(24000 * 2e-6 + 4)


def test_tokens_are_estimated_from_the_bytes():
    assert estimate_tokens(["four char words" * 10]) == 38
    assert estimate_tokens(["知识"]) == 2


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(key=st.dictionaries(st.text(max_size=4), _JSON, max_size=3), value=_JSON.filter(lambda value: value is not None))
def test_the_cache_gives_back_what_it_got(tmp_path_factory, key, value):
    cache = Cache(tmp_path_factory.mktemp("cache"))
    assert cache.get("answers", key) is None
    assert cache.put("answers", key, value) == value == cache.get("answers", key)
    assert cache.put("answers", dict(reversed(key.items())), "other") == value


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "other", "folder"])
def test_a_corrupt_entry_is_a_miss_and_is_replaced(tmp_path, damage):
    cache = Cache(tmp_path)
    cache.put("answers", {"a": 1}, {"text": "mild"})
    path = cache.path("answers", {"a": 1})
    content = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
        assert cache.get("answers", {"a": 1}) is None
        with pytest.raises(KoreError, match="cache cannot be written"):
            cache.put("answers", {"a": 1}, 2)
        return
    path.write_bytes(
        {"cut": content[:-9], "empty": b"", "changed": content.replace(b"mild", b"wild"), "other": b"[1]"}[damage]
    )
    assert cache.get("answers", {"a": 1}) is None
    assert cache.put("answers", {"a": 1}, {"text": "new"}) == {"text": "new"} == cache.get("answers", {"a": 1})


_WRITE_OFTEN = """
import sys
from kore.augmentation.cache import Cache
cache = Cache(sys.argv[1])
for turn in range(30):
    assert cache.put("answers", {"turn": turn}, [turn] * 200) == [turn] * 200
    assert cache.get("answers", {"turn": turn}) == [turn] * 200
"""


def test_threads_and_processes_share_a_cache(tmp_path):
    processes = [subprocess.Popen([sys.executable, "-c", _WRITE_OFTEN, str(tmp_path)]) for _ in range(2)]
    failures = []

    def write():
        cache = Cache(tmp_path)
        for turn in range(30):
            if cache.put("answers", {"turn": turn}, [turn] * 200) != [turn] * 200:
                failures.append(turn)

    def watched():
        try:
            write()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=watched) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait(60) for process in processes] == [0, 0] and failures == []
    assert len(list(tmp_path.rglob("*.json"))) == 30 and not list(tmp_path.rglob("*.tmp-*"))


def test_replies_are_read_from_prose_fences_and_after_thoughts():
    good = json.dumps(rounds("A"))
    for text in (good, f"Sure!\n```json\n{good}\n```", f'<think>maybe {{"rounds": []}}</think>{good} Done.'):
        answer, reasons = parse(text, Dialogue)
        assert answers(answer) == ["A"] and reasons == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("I cannot do that.", "no JSON object"),
        ('{"rounds": [{"question": "a?", "answer": "b"}, {"questi', "ends before it is complete"),
        ('{"rounds": [}]', "not valid JSON"),
        ('{"rounds": []}', "rounds: tuple should have at least 1 item"),
        ('{"rounds": 7}', "rounds: input should be a valid tuple"),
        ('{"answers": []}', "rounds: field required"),
        ('{"a":' * 100_000, "ends before it is complete|nested too deeply"),
        ("[1, 2]", "no JSON object"),
    ],
)
def test_a_reply_that_cannot_be_read_says_why(text, reason):
    answer, reasons = parse(text, Dialogue)
    assert answer is None and re.search(reason, " ".join(reasons))


def test_of_a_list_the_valid_parts_are_read():
    entries = [*rounds("A")["rounds"], {"question": "x?"}, {"question": 3, "answer": "y"}, *rounds("B")["rounds"]]
    answer, reasons = parse(json.dumps({"rounds": entries}), Dialogue)
    assert answers(answer) == ["A", "B"]
    assert reasons == [
        "rounds 2, answer: field required.",
        "rounds 3, question: input should be a valid string.",
    ]
    answer, reasons = parse(json.dumps(rounds(*"ABCDEFGHIJKL")), Dialogue)
    assert answers(answer) == list("ABCDEFGHIJ") and "at most 10" in reasons[0]


def test_schemas_are_in_the_subset_of_strict_structured_outputs():
    for schema in (Dialogue, Caption, Questions):
        text = json.dumps(json_schema(schema))
        assert not any(f'"{word}":' in text for word in ("title", "default", "minLength", "maxLength"))
        for node in [json_schema(schema), *json_schema(schema).get("$defs", {}).values()]:
            assert node["additionalProperties"] is False and node["required"] == list(node["properties"])


def test_joined_answers_have_each_question_once():
    first = Dialogue(rounds=[Round(question="Who founded Arven?", answer="Mira")])
    second = Dialogue(rounds=[Round(question="who founded ARVEN", answer="Mira Solt")])
    assert answers(first.joined(second)) == ["Mira Solt"]


def test_the_tokens_that_an_answer_took_count_and_not_the_estimate():
    time = Time()
    limits = Limits(tokens_per_minute=100, clock=time, sleep=time.sleep)
    limits.call(lambda: "a", name="a", tokens=100, used=lambda _: 10)
    limits.call(lambda: "b", name="b", tokens=90)
    assert time.slept == []
    limits.call(lambda: "c", name="c", tokens=1)
    assert time.slept == [60.0]
