"""Whole augmentations: exact, resumable, honest about what failed; through a real server process on loopback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kore.artifacts import read_manifest
from kore.augmentation import pool
from kore.augmentation.ask import NotGenerated
from kore.augmentation.config import AugmentConfig
from kore.augmentation.generators.rules import RulesGenerator
from kore.augmentation.guard import Guard, Stop
from kore.augmentation.items import load_knowledge
from kore.augmentation.pool import in_threads
from kore.augmentation.run import KIND, augment
from kore.augmentation.schema import Caption, Dialogue, Questions
from kore.augmentation.types import Request
from kore.cli import main
from kore.errors import ArtifactError, ConfigError, DataError, KoreError, Unavailable
from kore.pipeline.stage import only_one
from tests.augment_knowledge import write_knowledge
from tests.augment_server import KEY, Fault, ScriptedServer, read_no_certificates

SCHEMAS = {"rounds": ("dialogue", Dialogue), "depicted": ("caption", Caption), "questions": ("vqa", Questions)}


class Talkative:
    """What a good model would say: the answers by rules, found by the text in the prompt."""

    def __init__(self, knowledge: Path) -> None:
        self.items, self.rules = list(load_knowledge(knowledge)), RulesGenerator()

    def __call__(self, body):
        item, task, schema = self.asked(body)
        return json.loads(self.rules.generate(Request(task, item, (), schema, 999)).text)

    def asked(self, body):
        properties = body["response_format"]["json_schema"]["schema"]["properties"]
        words = " ".join(message["content"] for message in body["messages"])
        task, schema = SCHEMAS[next(name for name in SCHEMAS if name in properties)]
        return next(item for item in self.items if item.text in words), task, schema


def config(server=None, **changes):
    values = {"quality": False, "limits": {"backoff": 0.02, "retries": 3}, **changes}
    if server is not None:
        values["generator"] = {
            "kind": "openai",
            "model": "scripted",
            "base_url": server.url,
            "api_key_env": "AUGMENT_TEST_KEY",
            "timeout": 0.5,
        }
    return AugmentConfig.model_validate(values)


@pytest.fixture(autouse=True)
def _fast_clients(monkeypatch):
    read_no_certificates(monkeypatch)


@pytest.fixture
def knowledge(tmp_path, monkeypatch):
    monkeypatch.setenv("AUGMENT_TEST_KEY", KEY)
    return write_knowledge(tmp_path / "data" / "knowledge.jsonl", 6)


def files_of(out: Path):
    """All files of a result but the cache and the statistics."""
    kept = (path for path in sorted(out.rglob("*")) if path.is_file() and "cache" not in path.relative_to(out).parts)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in kept if path.name != "run.json"}


def holds(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_any_number_of_workers_writes_the_same_bytes(knowledge, tmp_path):
    every = ["llava", "sharegpt", "openai", "plain"]
    one = augment(knowledge, config(workers=1, export=every, quality=True), tmp_path / "one", progress=False)
    four = augment(knowledge, config(workers=4, export=every, quality=True), tmp_path / "four", progress=False)
    assert files_of(one.out) == files_of(four.out) and len(one.samples) == 4 and one.images == 6
    manifest = read_manifest(one.out, KIND)
    assert set(manifest["files"]) | {"manifest.json"} == set(files_of(one.out))
    assert manifest["samples"] == one.samples and not one.failures
    assert str(tmp_path) not in (one.out / "images.json").read_text() and str(tmp_path) not in json.dumps(manifest)
    other = augment(knowledge, config(seed=1), tmp_path / "other", progress=False)
    assert files_of(other.out)["llava.json"] != files_of(one.out)["llava.json"]


def test_items_that_differ_in_their_id_alone_have_samples_of_their_own(knowledge, tmp_path):
    row = json.loads(knowledge.read_text().splitlines()[0])
    knowledge.write_text("".join(json.dumps({**row, "id": name}) + "\n" for name in ("one", "two")))
    made = augment(knowledge, config(), tmp_path / "out", progress=False)
    names = [row["id"] for row in json.loads(made.data.read_text())]
    assert len(set(names)) == len(names) and {name.partition("-")[0] for name in names} == {"one", "two"}


def overwrite(folder):
    """Change a value in each entry of a cache, as a failing disk may."""
    for entry in folder.rglob("*.json"):
        entry.write_text(entry.read_text().replace('"turns":[[', '"turns":[["Who?","Nobody."],['))


def test_what_is_done_is_not_done_again(knowledge, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = augment(knowledge, config(), out, progress=False)
    before = files_of(out)
    made = []
    monkeypatch.setattr(RulesGenerator, "generate", lambda self, request: made.append(request) or pytest.fail("again"))
    again = augment(knowledge, config(), out, progress=False)
    assert (first.kept, again.kept) == (0, 6) and files_of(out) == before and not made
    monkeypatch.undo()
    # A changed item is made anew, and it alone; so are all with another seed.
    rows = [json.loads(line) for line in knowledge.read_text().splitlines()]
    rows[2]["text"] += " It was shown in Brest."
    knowledge.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert augment(knowledge, config(), out, progress=False).kept == 5
    assert augment(knowledge, config(seed=1), out, progress=False).kept == 0
    # As is one whose own picture is another now.
    shutil.copy(knowledge.parent / "images" / "0.png", knowledge.parent / "images" / "3.png")
    assert augment(knowledge, config(seed=1), out, progress=False).kept == 5
    # As is one whose image or result is damaged.
    for damage in (lambda: shutil.rmtree(out / "cache" / "images"), lambda: overwrite(out / "cache" / "item")):
        damage()
        # Two items have the same picture, which is back when one of them is made.
        assert augment(knowledge, config(seed=1), out, progress=False).kept <= 1
        assert augment(knowledge, config(seed=1), out, progress=False).kept == 6


def test_faults_of_a_server_change_nothing_in_the_end(knowledge, tmp_path):
    calm = augment(knowledge, config(), tmp_path / "rules", progress=False)
    faults = {
        0: Fault(status=500),
        2: Fault(content="{broken"),
        3: Fault(status=429, headers={"Retry-After": "0.05"}),
        5: Fault(truncate=True),
        7: Fault(hang=2),
        9: Fault(content='{"rounds": []}'),
        10: Fault(body=b"<html>", status=502),
    }
    with ScriptedServer(Talkative(knowledge), faults) as server:
        made = augment(knowledge, config(server), tmp_path / "out", progress=False)
        assert not made.failures and made.samples == calm.samples
        assert made.accounting["failed"] >= 4 and 1 <= made.accounting["rejected"] <= 2
        asked = len(server.requests)
        again = augment(knowledge, config(server), tmp_path / "out", progress=False)
        # Another result from the same cache asks nothing either.
        other = config(server, export=["openai"])
        augment(knowledge, other, tmp_path / "second", progress=False, cache=tmp_path / "out" / "cache")
        assert len(server.requests) == asked and again.kept == 6
    assert not holds(tmp_path, KEY)


@pytest.mark.slow
def test_a_killed_run_goes_on_without_asking_twice(knowledge, tmp_path):
    with ScriptedServer(Talkative(knowledge)) as server:
        whole = augment(knowledge, config(server), tmp_path / "whole", progress=False)
    reached = threading.Event()

    def slow(number, body):
        if number >= 9:
            reached.set()
        return Fault(hang=30) if number >= 9 and not resumed else None

    resumed = False
    with ScriptedServer(Talkative(knowledge), slow) as server:
        process = subprocess.Popen(command(knowledge, tmp_path / "out", server, timeout=60))
        assert reached.wait(30)
        time.sleep(0.1)
        process.kill()
        process.wait()
        assert not (tmp_path / "out" / "manifest.json").exists()
        before = [json.dumps(body, sort_keys=True) for body in server.requests]
        resumed = True
        killed = len(before)
        again = augment(knowledge, config(server), tmp_path / "out", progress=False)
        after = [json.dumps(body, sort_keys=True) for body in server.requests[killed:]]
    answered = set(before[:9])
    assert answered and not answered & set(after) and len(after) == len(set(after))
    assert files_of(again.out) == files_of(whole.out) | {"manifest.json": files_of(again.out)["manifest.json"]}
    assert len(set(before) | set(after)) == 18 and again.items == 6


def command(knowledge, out, server, **generator):
    words = [sys.executable, "-m", "kore", "augment", str(knowledge), "-o", str(out), "-m", "scripted"]
    words += ["--base-url", server.url, "--set", "quality=false", "--set", "generator.api_key_env=AUGMENT_TEST_KEY"]
    for name, value in generator.items():
        words += ["--set", f"generator.{name}={value}"]
    return words


@pytest.fixture
def interruptible():
    """A background job is started with SIGINT ignored, and so would be the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_ends_it_soon_and_cleanly(number, knowledge, tmp_path, monkeypatch, capsys, interruptible):
    monkeypatch.setattr(pool, "GRACE", 0.1)

    def hang(asked, body):
        if asked == 4:
            os.kill(os.getpid(), number)
        return Fault(hang=60) if asked >= 4 else None

    before = signal.getsignal(signal.SIGTERM)
    with ScriptedServer(Talkative(knowledge), hang) as server:
        started = time.perf_counter()
        assert main(command(knowledge, tmp_path / "out", server, timeout=100)[3:]) == 130
        assert time.perf_counter() - started < 50  # of the 60 that the server hangs
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1] == "error: interrupted; the same command goes on where it stopped"
    assert signal.getsignal(signal.SIGTERM) is before
    for _ in range(50):  # a thread that was not waited for may be writing its last file
        if not list((tmp_path / "out").rglob("*.tmp-*")):
            break
        time.sleep(0.1)
    assert not holds(tmp_path, KEY) and not list((tmp_path / "out").rglob("*.tmp-*"))
    with ScriptedServer(Talkative(knowledge)) as server:
        assert augment(knowledge, config(server), tmp_path / "out", progress=False).items == 6


def test_a_refused_key_ends_the_run_at_once_and_is_shown_nowhere(knowledge, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("AUGMENT_TEST_KEY", "sk-wrong-0123456789")
    with ScriptedServer(Talkative(knowledge)) as server:
        with pytest.raises(KoreError) as caught:
            augment(knowledge, config(server, workers=1), tmp_path / "out", progress=False)
        assert len(server.requests) == 1
    assert "sk-wrong" not in str(caught.value) + caplog.text and not holds(tmp_path, "sk-wrong")


def test_a_server_that_is_gone_ends_the_run_and_what_is_done_is_kept(knowledge, tmp_path):
    def dies(number, body):
        return Fault(status=503) if number >= 6 and dead else None

    dead = True
    settings = {"workers": 1, "limits": {"backoff": 0.01, "retries": 1, "stop_after": 4}}
    with ScriptedServer(Talkative(knowledge), dies) as server:
        with pytest.raises(KoreError, match=r"4 requests in a row failed, at last: .*what is done is kept"):
            augment(knowledge, config(server, **settings), tmp_path / "out", progress=False)
        dead = False
        made = augment(knowledge, config(server, **settings), tmp_path / "out", progress=False)
    assert made.kept == 2 and not made.failures and made.items == 6


def test_a_passing_failure_is_reported_and_tried_again(knowledge, tmp_path):
    class Moody(RulesGenerator):
        down = True

        def generate(self, request):
            if self.down and request.item.id == "news-1" and request.task == "caption":
                raise Unavailable("the server sleeps")
            return super().generate(request)

    moody = Moody()
    settings = config(limits={"retries": 0})
    first = augment(knowledge, settings, tmp_path / "out", progress=False, generator=moody)
    (line,) = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    failure = json.loads(line)
    assert (failure["item"], failure["task"]) == ("news-1", "caption") and "the server sleeps" in failure["reason"]
    assert failure["source"] == f"{knowledge}:2" and failure["passing"] is True
    assert sum(first.failures.values()) == first.passing == 1
    assert first.samples["caption"] == 5 and first.samples["dialogue"] == 6
    moody.down = False
    second = augment(knowledge, settings, tmp_path / "out", progress=False, generator=moody)
    assert second.kept == 5 and not second.failures and not second.passing and second.samples["caption"] == 6
    assert (tmp_path / "out" / "failures.jsonl").read_text() == ""


def test_bad_rows_are_in_the_list_of_failures(knowledge, tmp_path):
    with knowledge.open("a") as file:
        file.write('{"type": "film", "name": "x"}\n')
    with pytest.raises(DataError, match=r"knowledge\.jsonl:7: no column 'text'"):
        augment(knowledge, config(), tmp_path / "out", progress=False)
    made = augment(knowledge, config(on_bad_row="skip"), tmp_path / "out", progress=False)
    assert made.bad_rows == 1 and made.items == 6
    failure = json.loads((tmp_path / "out" / "failures.jsonl").read_text())
    assert failure["source"] == f"{knowledge}:7" and "no column 'text'" in failure["reason"]


def test_nothing_made_is_an_error(knowledge, tmp_path):
    class Silent(RulesGenerator):
        def generate(self, request):
            raise NotGenerated("nothing to say")

    with pytest.raises(DataError, match=r"nothing could be made of 6 items, the first reason: .*nothing to say"):
        augment(knowledge, config(tasks=["dialogue"]), tmp_path / "out", progress=False, generator=Silent())
    assert len((tmp_path / "out" / "failures.jsonl").read_text().splitlines()) == 6


def test_one_run_at_a_time_and_no_foreign_directory(knowledge, tmp_path):
    with only_one(tmp_path / "out"), pytest.raises(ArtifactError, match="another process is working here"):
        augment(knowledge, config(), tmp_path / "out", progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").touch()
    with pytest.raises(ArtifactError, match="no augmentation has made; delete it or choose another"):
        augment(knowledge, config(), tmp_path / "mine", progress=False)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["precious"]


def test_images_of_a_folder_are_linked_with_their_licence(knowledge, tmp_path):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    about = []
    for number in range(3):
        Image.new("RGB", (48, 40), (10 * number, 200, 99)).save(tmp_path / "pictures" / f"{number}.png")
        about.append({"file_name": f"{number}.png", "text": "Arvena 0 film", "licence": "CC0", "author": "A. Painter"})
    (tmp_path / "pictures" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in about))
    images = {"kind": "folder", "path": tmp_path / "pictures"}
    made = augment(knowledge, config(images=images, max_items=1), tmp_path / "out", progress=False)
    listed = json.loads((made.out / "images.json").read_text())
    assert len(listed) == made.images >= 2 and any(entry["licence"] == "CC0" for entry in listed)
    rows = json.loads(made.data.read_text())
    assert {row["image"] for row in rows} == {entry["image"] for entry in listed}
    assert all((made.out / entry["image"]).is_file() for entry in listed)
    # Without the source the images that are not used any more go.
    assert augment(knowledge, config(max_items=1), made.out, progress=False).images == 1
    assert len(list((made.out / "images").iterdir())) == 1


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_the_run_in_one_line_and_it_goes_on_later(knowledge, tmp_path, monkeypatch):
    from kore.augmentation import cache, export

    written, write = [], cache.atomic_write

    def almost_full(path, *arguments, **options):
        if len(written) == 4:
            full()
        written.append(write(path, *arguments, **options))

    out = tmp_path / "out"
    with ScriptedServer(Talkative(knowledge)) as server:
        monkeypatch.setattr(cache, "atomic_write", almost_full)
        with pytest.raises(ConfigError, match=r"the cache cannot be written \(No space left on device\); free some"):
            augment(knowledge, config(server, workers=1), out, progress=False)
        monkeypatch.undo()
        monkeypatch.setenv("AUGMENT_TEST_KEY", KEY)
        monkeypatch.setattr(export, "_rows", full)
        with pytest.raises(KoreError, match=r"out: No space left on device; what is done is kept"):
            augment(knowledge, config(server), out, progress=False)
        assert not (out / "llava.json").exists() and not (out / "manifest.json").exists()
        monkeypatch.undo()
        monkeypatch.setenv("AUGMENT_TEST_KEY", KEY)
        made = augment(knowledge, config(server), out, progress=False)
        # One answer could not be kept and was asked for again; nothing else.
        assert made.kept == 6 and len(server.requests) == 19
    assert not [path for path in out.rglob("*") if ".tmp-" in path.name]


def test_an_image_that_goes_while_it_runs_is_named(knowledge, tmp_path):
    items = load_knowledge(knowledge)
    (knowledge.parent / "images" / "4.png").unlink()
    with pytest.raises(DataError, match=r"image not found: .*4\.png"):
        augment(items, config(), tmp_path / "out", progress=False)


def test_knowledge_that_changes_while_it_is_read_is_refused(knowledge, tmp_path):
    items = load_knowledge(knowledge)
    knowledge.write_text(knowledge.read_text() + "\n")
    with pytest.raises(DataError, match="changes while it is read"):
        augment(items, config(), tmp_path / "out", progress=False)


def test_a_result_that_is_moved_goes_on_at_its_new_place(knowledge, tmp_path):
    augment(knowledge, config(), tmp_path / "out", progress=False)
    before = files_of(tmp_path / "out")
    shutil.move(knowledge.parent, tmp_path / "elsewhere")
    shutil.move(tmp_path / "out", tmp_path / "deep" / "moved")
    moved = tmp_path / "elsewhere" / knowledge.name
    again = augment(moved, config(), tmp_path / "deep" / "moved", progress=False)
    assert again.kept == 6 and files_of(again.out) == before


def test_two_runs_share_a_cache_at_the_same_time(knowledge, tmp_path):
    outs = [tmp_path / "one", tmp_path / "two"]
    with ScriptedServer(Talkative(knowledge)) as server:

        def work(out):
            augment(knowledge, config(server), out, progress=False, cache=tmp_path / "cache")

        threads = [threading.Thread(target=work, args=(out,)) for out in outs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert files_of(outs[0]) == files_of(outs[1]) and len(files_of(outs[0])) > 8
    assert not [path for path in (tmp_path / "cache").rglob("*") if ".tmp-" in path.name]


def test_a_guard_tells_what_ends_a_run():
    def failing(error):
        def call():
            raise error

        return call

    guard = Guard(4)
    for _ in range(2):
        with pytest.raises(Unavailable):
            guard.call(failing(Unavailable("x")), lasting=False)
    # Words that cannot be used are an answer all the same; once there was one, more may fail.
    with pytest.raises(NotGenerated):
        guard.call(failing(NotGenerated("x")), lasting=True)
    for _ in range(3):
        with pytest.raises(DataError):
            guard.call(failing(DataError("x")), lasting=False)
    with pytest.raises(Stop, match="4 requests in a row failed, at last: y"):
        guard.call(failing(Unavailable("y")), lasting=False)
    with pytest.raises(Stop):
        guard.call(lambda: pytest.fail("asked"), lasting=False)
    with pytest.raises(Stop, match="a wrong key"):
        Guard(None).call(failing(ConfigError("a wrong key")), lasting=False)
    with pytest.raises(Unavailable):
        Guard(None).call(failing(Unavailable("x")), lasting=True)


def test_jobs_are_taken_as_there_is_room():
    taken = 0

    def jobs():
        nonlocal taken
        for number in range(100):
            taken += 1
            yield number

    ahead = []
    results = set()
    for count, (job, square) in enumerate(in_threads(lambda number: number**2, jobs(), 3), start=1):
        ahead.append(taken - count)
        results.add((job, square))
    assert results == {(number, number**2) for number in range(100)} and max(ahead) < 6
    stopped = []
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda number: 1 // number, range(3), 2, lambda: stopped.append(True)))
    assert stopped == [True]


def test_the_estimate_counts_real_prompts_and_asks_nothing(knowledge, tmp_path):
    from kore.augmentation.forecast import estimate

    with ScriptedServer(Talkative(knowledge)) as server:
        priced = config(server)
        priced = AugmentConfig.model_validate(
            {**priced.model_dump(), "generator": {**priced.generator.model_dump(), "price_input": 2, "price_output": 8}}
        )
        found = estimate(knowledge, priced, tmp_path / "out" / "cache")
        assert not server.requests and not (tmp_path / "out").exists() and os.listdir(tmp_path) == ["data"]
        made = augment(knowledge, priced, tmp_path / "out", progress=False)
        spent = made.accounting
        assert (found.items, found.requests, found.cached) == (6, spent["requests"], 0)
        assert 0.7 < found.prompt_tokens / spent["prompt_tokens"] < 1.4
        assert found.cost == pytest.approx((2 * found.prompt_tokens + 8 * found.completion_tokens) / 1e6)
        rest = estimate(knowledge, priced, tmp_path / "out" / "cache")
        assert rest.done == 6 and rest.requests == 0 and rest.cost == 0
        # Other results that are made of the same answers cost nothing either.
        changed = AugmentConfig.model_validate({**priced.model_dump(), "tasks": ["dialogue"]})
        cached = estimate(knowledge, changed, tmp_path / "out" / "cache")
        assert cached.done == 0 and cached.cached == cached.requests == 6 and cached.cost == 0


def test_a_run_that_cannot_begin_leaves_nothing(knowledge, tmp_path):
    wrong = [
        (tmp_path / "none.jsonl", AugmentConfig()),
        (knowledge, AugmentConfig(images={"kind": "folder", "path": tmp_path / "nowhere"})),
    ]
    for path, settings in wrong:
        with pytest.raises(KoreError):
            augment(path, settings, tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()
