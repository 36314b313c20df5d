"""Images for the augmentation: store, choice, local search, Commons, Google, SerpApi, CLIP."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
from PIL import Image, ImageDraw
from pydantic import ValidationError

from kore.augmentation.cache import Cache
from kore.augmentation.images import Images, ImageSettings, ImageStore, Problem, choose, make_images
from kore.augmentation.images.commons import Commons
from kore.augmentation.images.folder import FolderSource
from kore.augmentation.images.google import Google
from kore.augmentation.images.serpapi import SerpApi
from kore.augmentation.images.service import link, text
from kore.augmentation.images.words import WordIndex
from kore.augmentation.types import Candidate
from kore.errors import ConfigError, DataError, KoreError, ModelError, Unavailable
from kore.fetch import Allowlist
from tests.image_server import image_server, picture


@pytest.fixture
def server():
    with image_server() as running:
        yield running


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def scene(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """A picture of coloured shapes; another seed gives another picture."""
    random = numpy.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(int(v) for v in random.integers(0, 255, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = int(random.integers(0, size[0])), int(random.integers(0, size[1]))
        colour = tuple(int(v) for v in random.integers(0, 255, 3))
        draw.ellipse([x - 25, y - 25, x + 25, y + 25], fill=colour)
    return image


def save(image: Image.Image, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


class TestStore:
    def test_an_image_is_named_by_its_content_and_says_where_it_is_from(self, server, tmp_path):
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "a secret"
        exif.get_ifd(0x8825).update({1: "N", 2: (51.0, 30.0, 0.0)})
        server.pages["/a.jpg"] = picture(exif=exif)
        store = ImageStore(tmp_path / "store", server.downloader())
        candidate = Candidate(server.url("/a.jpg"), None, "https://p.example/a", "A hall", "CC BY 4.0", "Ada")
        stored = store.fetch(candidate)
        content = stored.path.read_bytes()
        assert hashlib.sha256(content).hexdigest() == stored.sha256 and stored.path.name == f"{stored.sha256}.jpg"
        assert (stored.width, stored.height) == (40, 60) and b"secret" not in content and b"Exif" not in content
        with Image.open(stored.path) as image:
            assert dict(image.getexif()) == {} and image.size == (40, 60)
        record = json.loads(stored.path.with_suffix(".json").read_text())
        assert record["file"] == stored.path.name and record["sha256"] == stored.sha256
        assert record["sources"] == [
            {
                "url": server.url("/a.jpg"),
                "page": "https://p.example/a",
                "title": "A hall",
                "licence": "CC BY 4.0",
                "author": "Ada",
                "width": 40,
                "height": 60,
                "format": "JPEG",
            }
        ]

    def test_what_is_without_loss_stays_so_while_it_is_small_or_a_drawing(self, tmp_path):
        store = ImageStore(tmp_path / "store")
        small = save(scene(0), tmp_path / "small.png")
        large = save(scene(0, (800, 600)), tmp_path / "large.png")
        drawing = save(scene(0, (800, 600)).quantize(8), tmp_path / "drawing.png")
        photo = save(scene(0), tmp_path / "photo.jpg")
        assert [store.keep(path).path.suffix for path in (small, large, drawing, photo)] == [
            ".png",
            ".jpg",
            ".png",
            ".jpg",
        ]
        with Image.open(store.keep(small).path) as image:
            assert numpy.array_equal(numpy.asarray(image), numpy.asarray(scene(0)))

    def test_large_images_are_reduced(self, tmp_path):
        path = save(scene(0, (900, 300)), tmp_path / "wide.jpg")
        stored = ImageStore(tmp_path / "store", max_side=300).keep(path)
        assert (stored.width, stored.height) == (300, 100)
        with Image.open(stored.path) as image:
            assert image.size == (300, 100)

    def test_the_same_picture_twice_is_one_file_with_both_places(self, tmp_path):
        paths = [save(scene(0), tmp_path / name) for name in ("b.png", "a.png")]
        contents = []
        for order in (paths, paths[::-1]):
            store = ImageStore(tmp_path / f"store{len(contents)}")
            first, second = [store.keep(path) for path in order]
            assert first.sha256 == second.sha256
            store.keep(paths[0])
            contents.append({file.name: file.read_bytes() for file in store.folder.iterdir()})
        assert contents[0] == contents[1] and len(contents[0]) == 2
        record = json.loads(contents[0][f"{first.sha256}.json"])
        assert [source["file"] for source in record["sources"]] == ["a.png", "b.png"]

    def test_threads_store_the_same_image_at_once(self, tmp_path):
        store = ImageStore(tmp_path / "store")
        paths = [save(scene(index % 2), tmp_path / f"{index}.png") for index in range(16)]
        with ThreadPoolExecutor(8) as pool:
            stored = list(pool.map(store.keep, paths))
        assert len({image.sha256 for image in stored}) == 2
        assert len(list(store.folder.iterdir())) == 4
        records = [json.loads(file.read_text()) for file in store.folder.glob("*.json")]
        assert [len(record["sources"]) for record in records] == [8, 8]

    def test_bad_files_leave_nothing_behind(self, server, tmp_path):
        server.pages["/cut.jpg"] = picture(size=(200, 200))[:500]
        server.pages["/page"] = b"<html></html>"
        store = ImageStore(tmp_path / "store", server.downloader(), max_pixels=100_000)
        with pytest.raises(DataError, match="cannot be decoded"):
            store.fetch(Candidate(server.url("/cut.jpg?key=SECRET")))
        with pytest.raises(KoreError, match="an HTML page"):
            store.fetch(Candidate(server.url("/page")))
        big = save(scene(0, (400, 300)), tmp_path / "big.png")
        with pytest.raises(DataError, match="400 x 300 pixels"):
            store.keep(big)
        with pytest.raises(DataError, match="cannot be read"):
            store.keep(tmp_path / "missing.png")
        with pytest.raises(DataError, match="the limit is 10"):
            ImageStore(tmp_path / "store", max_bytes=10).keep(big)
        assert not store.folder.exists()

    def test_the_network_is_off_by_default(self, tmp_path):
        with pytest.raises(KoreError, match="the network is off"):
            ImageStore(tmp_path).fetch(Candidate("https://example.org/a.jpg"))

    def test_a_damaged_file_is_not_found_and_is_written_again(self, tmp_path):
        store, path = ImageStore(tmp_path / "store"), save(scene(0), tmp_path / "a.png")
        stored = store.keep(path)
        assert store.find(stored.sha256, stored.candidate) == stored
        stored.path.write_bytes(stored.path.read_bytes()[:50])
        assert store.find(stored.sha256, stored.candidate) is None
        again = ImageStore(store.folder).keep(path)
        assert again == stored and hashlib.sha256(again.path.read_bytes()).hexdigest() == stored.sha256

    def test_damage_that_leaves_the_size_is_repaired_too(self, tmp_path):
        store, path = ImageStore(tmp_path / "store"), save(scene(0), tmp_path / "a.png")
        stored = store.keep(path)
        stored.path.write_bytes(bytes(stored.path.stat().st_size))
        assert store.find(stored.sha256, stored.candidate) is None
        assert ImageStore(store.folder).keep(path) == store.find(stored.sha256, stored.candidate)

    def test_a_store_that_cannot_be_written_is_said_and_ends_the_search(self, cache, tmp_path):
        path = save(scene(0), tmp_path / "a.png")
        (tmp_path / "store").write_text("a file where the folder should be")
        finder = Images(Fixed(Candidate(path=path)), ImageStore(tmp_path / "store"), cache)
        with pytest.raises(ConfigError, match=r"store.*cannot be stored.*choose another folder"):
            finder.find("a hall")
        assert finder.problems == ()

    def test_a_kill_at_any_moment_leaves_whole_files(self, tmp_path):
        path = save(scene(0), tmp_path / "a.png")
        script = f"""
import os, signal
from pathlib import Path
from kore.augmentation.images.store import ImageStore
replace, calls = Path.replace, 0
def killing(path, target):
    global calls
    calls += 1
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(path, target)
    if calls + 2 == number:
        os.kill(os.getpid(), signal.SIGKILL)
for number in range(1, 6):
    if (child := os.fork()) == 0:
        Path.replace = killing
        ImageStore(Path(r"{tmp_path}") / str(number)).keep(r"{path}")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))
        assert done.stdout.split() == [str(-signal.SIGKILL)] * 4 + ["0"], done.stderr
        for number in range(1, 6):
            store = ImageStore(tmp_path / str(number))
            for file in store.folder.iterdir():
                if not file.name.startswith("."):
                    assert file.suffix == ".json" or hashlib.sha256(file.read_bytes()).hexdigest() == file.stem
            stored = store.keep(path)
            assert store.find(stored.sha256, stored.candidate) == stored


class Ranking:
    """Similarities by file name, instead of a model."""

    def __init__(self, values):
        self.values = values

    def similarities(self, original, others):
        return [self.values[path] for path in others]


class TestChoose:
    @pytest.fixture
    def store(self, tmp_path):
        return ImageStore(tmp_path / "store")

    def _stored(self, store, tmp_path, name, image, **options):
        return store.keep(save(image, tmp_path / "found" / name, **options))

    def test_identical_pictures_are_left_out(self, store, tmp_path):
        original = save(scene(1), tmp_path / "original.png")
        found = [
            self._stored(store, tmp_path, "same.png", scene(1)),
            self._stored(store, tmp_path, "resized.png", scene(1).resize((300, 225), Image.Resampling.LANCZOS)),
            self._stored(store, tmp_path, "compressed.jpg", scene(1), quality=70),
            self._stored(store, tmp_path, "other.jpg", scene(2)),
            self._stored(store, tmp_path, "other again.jpg", scene(2), quality=60),
            self._stored(store, tmp_path, "third.jpg", scene(3)),
            self._stored(store, tmp_path, "fourth.jpg", scene(4)),
        ]
        chosen = choose(original, found, None)
        assert [image for image, _ in chosen] == [found[3], found[5]]
        assert [value for _, value in chosen] == [None, None]
        assert choose(store.keep(original), found, None) == chosen
        assert [image for image, _ in choose(None, found, None)] == [found[0], found[3]]

    def test_small_differences_make_another_picture(self, store, tmp_path):
        marked = scene(1)
        ImageDraw.Draw(marked).rectangle([40, 30, 50, 38], fill="black")
        pictures = {
            "marked": marked,
            "mirrored": scene(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
            "brighter": scene(1).point(lambda value: min(255, value + 12)),
            "wider": scene(1).resize((130, 90)),
        }
        original = save(scene(1), tmp_path / "original.png")
        for name, image in pictures.items():
            found = self._stored(store, tmp_path, f"{name}.png", image)
            assert choose(original, [found], None) == [(found, None)], name

    def test_the_most_similar_are_kept_best_first(self, store, tmp_path):
        original = save(scene(9), tmp_path / "original.png")
        found = [self._stored(store, tmp_path, f"{seed}.png", scene(seed)) for seed in range(4)]
        similarity = Ranking(dict(zip([image.path for image in found], [0.25, 0.75, 0.12345678, 0.75])))
        assert choose(original, found, similarity) == [(found[1], 0.75), (found[3], 0.75)]
        assert [value for _, value in choose(original, found, similarity, keep=9)] == [0.75, 0.75, 0.25, 0.123457]
        assert choose(original, [], similarity) == []


class TestWords:
    def test_rare_words_count_more(self):
        index = WordIndex(["the red house", "the blue house", "the old zeppelin", "Café de l'Été"])
        assert list(index.search("the red house"))[:2] == [0, 1]
        assert next(index.search("a zeppelin over the house")) == 2
        assert list(index.search("cafe ETE")) == [3]
        assert list(index.search("nothing like it")) == []
        assert list(index.search("")) == []
        assert list(WordIndex([]).search("a house")) == []
        assert list(WordIndex(["a fox", "two words of a fox", "a fox"]).search("fox")) == [0, 2, 1]


class TestFolder:
    def test_names_and_captions(self, tmp_path):
        save(scene(1), tmp_path / "in" / "red_fox.jpg")
        save(scene(2), tmp_path / "in" / "sub" / "0002.png")
        save(scene(3), tmp_path / "in" / "0003.png")
        (tmp_path / "in" / "notes.txt").write_text("fox")
        row = {
            "file_name": "0002.png",
            "text": "A grey owl",
            "license": "CC0",
            "author": "Ada",
            "url": "https://p.example",
        }
        (tmp_path / "in" / "sub" / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        (tmp_path / "in" / "metadata.csv").write_text("file_name,caption\n0003.png,an owl and a fox\n")
        source = FolderSource(tmp_path / "in", tmp_path / "scratch")
        assert source.method == "words" and len(source) == 3
        owl = source.search("grey owl", 2)
        assert [candidate.path.name for candidate in owl] == ["0002.png", "0003.png"]
        assert owl[0] == Candidate(None, owl[0].path, "https://p.example", "A grey owl", "CC0", "Ada")
        assert owl[1].page == "0003.png" and owl[1].licence == "unknown"
        assert [c.path.name for c in source.search("fox", 5)] == ["red_fox.jpg", "0003.png"]
        again = FolderSource(tmp_path / "in", tmp_path / "scratch")
        assert source.identity() == again.identity()
        save(scene(3), tmp_path / "in" / "new.png")
        assert FolderSource(tmp_path / "in", tmp_path / "scratch").identity() != again.identity()

    def test_links_do_not_lead_outside(self, tmp_path):
        save(scene(1), tmp_path / "outside.png")
        save(scene(2), tmp_path / "in" / "a.png")
        (tmp_path / "in" / "link.png").symlink_to(tmp_path / "outside.png")
        source = FolderSource(tmp_path / "in", tmp_path / "scratch")
        assert [candidate.path.name for candidate in source.search("link a", 5)] == ["a.png"]
        assert list(source.skipped) == ["link.png"] and "outside the image root" in source.skipped["link.png"]
        finder = Images(source, ImageStore(tmp_path / "store"), Cache(tmp_path / "cache"))
        assert len(finder.find("link a")) == 1
        assert finder.problems == (Problem("", "link.png", source.skipped["link.png"]),)

    def test_metadata_with_ends_of_lines_and_half_characters_in_texts(self, tmp_path):
        for name in ("a.png", "b.png", "c.png"):
            save(scene(1), tmp_path / "in" / name)
        row = json.dumps({"file_name": "a.png", "title": "first\u2028second\u0085third"}, ensure_ascii=False)
        broken = '{"file_name": "b.png", "author": "Ada\\ud83d", "title": "half"}'
        (tmp_path / "in" / "metadata.jsonl").write_text(f"{row}\r\n\n{broken}\n", encoding="utf-8")
        (tmp_path / "in" / "metadata.csv").write_text('file_name,title\nc.png,"a grey\nowl, old"\n')
        source = FolderSource(tmp_path / "in", tmp_path / "scratch")
        assert [source.search(word, 5)[0].title for word in ("second", "owl")] == [
            "first second third",
            "a grey owl, old",
        ]
        found = source.search("half", 5)
        assert found[0].author == "Ada"
        assert ImageStore(tmp_path / "store").fetch(found[0]).path.is_file()

    def test_fields_that_utf8_cannot_hold_are_stored_without_that(self, tmp_path):
        path = save(scene(1), tmp_path / "a.png")
        candidate = Candidate(None, path, "b\udcff.png", "A \ud83d\u202ehall", "CC\n0", "Ada")
        stored = ImageStore(tmp_path / "store").fetch(candidate)
        [source] = json.loads(stored.path.with_suffix(".json").read_text(encoding="utf-8"))["sources"]
        assert (source["file"], source["title"], source["licence"]) == ("b.png", "A hall", "CC 0")

    def test_what_is_no_folder_of_images(self, tmp_path):
        with pytest.raises(DataError, match="expected a folder"):
            FolderSource(tmp_path / "nowhere", tmp_path)
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="no image"):
            FolderSource(tmp_path / "empty", tmp_path)
        save(scene(1), tmp_path / "bad" / "a.png")
        (tmp_path / "bad" / "metadata.jsonl").write_text('{"text": "no name"}\n')
        with pytest.raises(DataError, match=r"metadata\.jsonl, line 1: expected file_name"):
            FolderSource(tmp_path / "bad", tmp_path)

    def test_a_saved_data_set_and_parquet(self, tmp_path):
        import datasets

        files = [str(save(scene(seed), tmp_path / f"{seed}.png")) for seed in range(3)]
        rows = {"image": files, "caption": ["a red fox", "a grey owl", "an owl"], "license": ["CC0", "MIT", "CC0"]}
        features = {"image": datasets.Image(), "caption": datasets.Value("string"), "license": datasets.Value("string")}
        dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        dataset.to_parquet(str(tmp_path / "rows.parquet"))
        embedded = datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "hf"))
        embedded.save_to_disk(str(tmp_path / "saved"))
        for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
            source = FolderSource(path, tmp_path / "scratch")
            found = source.search("grey owl", 2)
            assert [candidate.title for candidate in found] == ["a grey owl", "an owl"]
            assert found[0].licence == "MIT" and found[0].page == f"{path.name}, row 1"
            with Image.open(found[0].path) as image:
                assert numpy.array_equal(numpy.asarray(image), numpy.asarray(scene(1)))
        datasets.Dataset.from_dict({"text": ["x"]}).to_parquet(str(tmp_path / "text.parquet"))
        with pytest.raises(DataError, match="expected an image column, found text"):
            FolderSource(tmp_path / "text.parquet", tmp_path)


COMMONS_ANSWER = {
    "query": {
        "pages": [
            {
                "index": 2,
                "title": "File:Second.jpg",
                "imageinfo": [{"url": "https://files.example/2.jpg", "descriptionurl": "https://w.example/2"}],
            },
            {
                "index": 1,
                "title": "File:First hall.jpg",
                "imageinfo": [
                    {
                        "url": "https://files.example/1.tif",
                        "thumburl": "https://files.example/960px-1.jpg",
                        "descriptionurl": "https://w.example/1",
                        "extmetadata": {
                            "LicenseShortName": {"value": "CC BY-SA 4.0"},
                            "Artist": {"value": '<a href="//w.example/Ada">Ada &amp; Bo</a>'},
                        },
                    }
                ],
            },
            {"index": 3, "title": "File:Gone.jpg"},
        ]
    }
}


class TestServices:
    def _page(self, answer):
        return lambda handler: handler.answer(body=json.dumps(answer).encode(), Content_Type="application/json")

    def _query(self, server, number=-1):
        from urllib.parse import parse_qs, urlsplit

        return {name: values[0] for name, values in parse_qs(urlsplit(server.asked[number][0]).query).items()}

    def test_commons(self, server):
        server.pages["/api"] = self._page(COMMONS_ANSWER)
        source = Commons(server.downloader(), server.url("/api"))
        first, second = source.search('Hall "of" insource:/x/ — fame', 5)
        assert first == Candidate(
            url="https://files.example/960px-1.jpg",
            page="https://w.example/1",
            title="First hall.jpg",
            licence="CC BY-SA 4.0",
            author="Ada & Bo",
        )
        assert (second.url, second.licence) == ("https://files.example/2.jpg", "unknown")
        query = self._query(server)
        assert query["gsrsearch"] == "filetype:bitmap Hall of insource x fame"
        assert (query["gsrnamespace"], query["gsrlimit"], query["maxlag"]) == ("6", "5", "5")
        assert source.search('"!?"', 5) == [] and len(server.asked) == 1

    def test_commons_without_results_and_with_errors(self, server):
        source = Commons(server.downloader(), server.url("/api"))
        server.pages["/api"] = self._page({"batchcomplete": True})
        assert source.search("nothing", 5) == []
        server.pages["/api"] = self._page({"error": {"code": "maxlag", "info": "Waiting: 7 s lagged"}})
        with pytest.raises(Unavailable, match="maxlag"):
            source.search("hall", 5)
        server.pages["/api"] = self._page({"error": {"code": "badvalue", "info": "Unrecognised value"}})
        with pytest.raises(KoreError, match="Unrecognised value") as caught:
            source.search("hall", 5)
        assert not isinstance(caught.value, Unavailable)

    @pytest.mark.parametrize(
        ("field", "said"),
        [
            ("<b>Ada</b> &amp; <i>Bo</i>", "Ada & Bo"),
            ("Photo: Ada<br/>Crop: Bo", "Photo: Ada Crop: Bo"),
            ("<div>Ada</div><div>Bo</div>", "Ada Bo"),
            ("H<sub>2</sub>O", "H2O"),
            ("a < b > c", "a < b > c"),
            ('<style data-x="1">.x{color:red}</style><!-- no > yes -->Ada', "Ada"),
            ("Ada\ud83d\u202e\u0000\r\n\tBo", "Ada Bo"),
            ("<" * 1_000_000, "<" * 300),
            ("<style>" * 1100, ""),
            (["Ada"], ""),
        ],
    )
    def test_html_becomes_text(self, field, said):
        start = time.monotonic()
        assert text(field) == said
        assert time.monotonic() - start < 0.5

    def test_pages_are_addresses_of_the_web(self):
        assert link("https://w.example/a b") == "https://w.example/a b"
        assert [link(value) for value in ("javascript:alert(1)", "//w.example/", "data:text/html,x", None)] == [""] * 4

    def test_commons_failures_that_pass(self, server):
        source = Commons(server.downloader(), server.url("/api"))
        for code in ("ratelimited", "readonly", "internal_api_error_DBQueryError", "cirrussearch-too-busy-error"):
            server.pages["/api"] = self._page({"error": {"code": code, "info": "Later"}})
            with pytest.raises(Unavailable, match=code):
                source.search("hall", 5)

    def test_quotas_that_are_used_up(self, server, monkeypatch):
        monkeypatch.setenv("GOOGLE_API_KEY", "SECRETKEY")
        monkeypatch.setenv("GOOGLE_CSE_ID", "SECRETENGINE")
        monkeypatch.setenv("SERPAPI_API_KEY", "SECRETKEY")
        daily = {
            "error": {"code": 403, "message": "Daily Limit Exceeded", "errors": [{"reason": "dailyLimitExceeded"}]}
        }
        server.pages["/v1"] = lambda handler: handler.answer(403, json.dumps(daily).encode())
        with pytest.raises(ConfigError, match=r"Daily Limit Exceeded.*quota"):
            Google(server.downloader(), "", server.url("/v1")).search("hall", 5)
        spent = {
            "error": {"code": 429, "message": "Quota exceeded for 'Queries per day'", "status": "RESOURCE_EXHAUSTED"}
        }
        server.pages["/v1"] = lambda handler: handler.answer(429, json.dumps(spent).encode())
        with pytest.raises(Unavailable, match="Queries per day"):
            Google(server.downloader(), "", server.url("/v1")).search("hall", 5)
        body = b'{"error": "Your account has run out of searches."}'
        server.pages["/s"] = lambda handler: handler.answer(429, body)
        with pytest.raises(Unavailable, match="run out of searches"):
            SerpApi(server.downloader(), "", server.url("/s")).search("hall", 5)
        server.pages["/s"] = lambda handler: handler.answer(401, b'{"error": "Invalid API key SECRETKEY."}')
        with pytest.raises(ConfigError, match="Invalid API key …"):
            SerpApi(server.downloader(), "", server.url("/s")).search("hall", 5)

    def test_queries_with_half_a_character(self, server):
        server.pages["/api"] = self._page({"batchcomplete": True})
        source = Commons(server.downloader(), server.url("/api"))
        assert source.search("hall \ud83d", 5) == []

    def test_google(self, server, monkeypatch):
        monkeypatch.setenv("GOOGLE_API_KEY", "SECRETKEY")
        monkeypatch.setenv("GOOGLE_CSE_ID", "SECRETENGINE")

        def page(handler):
            query = self._query(server)
            start, number = int(query["start"]), int(query["num"])
            items = [
                {
                    "link": f"https://i.example/{i}.jpg",
                    "title": f"<b>{i}</b>",
                    "image": {"contextLink": f"https://p.example/{i}"},
                }
                for i in range(start, min(start + number, 14))
            ]
            self._page({"items": items})(handler)

        server.pages["/v1"] = page
        source = Google(server.downloader(), "cc_publicdomain", server.url("/v1"))
        found = source.search("a hall", 12)
        assert [candidate.url for candidate in found] == [f"https://i.example/{i}.jpg" for i in range(1, 13)]
        assert found[0].page == "https://p.example/1" and found[0].title == "1"
        assert found[0].licence == "unknown (searched with rights=cc_publicdomain)"
        query = self._query(server, 0)
        assert (query["key"], query["cx"], query["searchType"], query["num"]) == (
            "SECRETKEY",
            "SECRETENGINE",
            "image",
            "10",
        )
        assert query["safe"] == "active"
        assert "SECRET" not in json.dumps(dict(source.identity())) and "SECRET" not in repr(source)
        assert len(source.search("a hall", 20)) == 13

    def test_a_wrong_key_is_an_error_of_the_configuration(self, server, monkeypatch):
        monkeypatch.setenv("GOOGLE_API_KEY", "SECRETKEY")
        monkeypatch.setenv("GOOGLE_CSE_ID", "SECRETENGINE")
        body = json.dumps({"error": {"code": 400, "message": "API key SECRETKEY not valid."}}).encode()
        server.pages["/v1"] = lambda handler: handler.answer(400, body)
        with pytest.raises(ConfigError, match="API key … not valid") as caught:
            Google(server.downloader(), "", server.url("/v1")).search("hall", 5)
        assert "SECRET" not in str(caught.value)

    def test_serpapi(self, server, monkeypatch):
        monkeypatch.setenv("SERPAPI_API_KEY", "SECRETKEY")
        results = [
            {"original": "https://i.example/1.jpg", "link": "https://p.example/1", "title": "One", "source": "P"},
            {"thumbnail": "https://i.example/only.jpg"},
            {"original": "https://i.example/2.jpg", "license_details_url": "https://cc.example/by"},
        ]
        server.pages["/s"] = self._page({"search_metadata": {"status": "Success"}, "images_results": results})
        source = SerpApi(server.downloader(), "cl", server.url("/s"))
        one, two = source.search("hall", 5)
        assert one.url == "https://i.example/1.jpg" and one.page == "https://p.example/1" and one.author == "P"
        assert one.licence == "unknown (searched with licenses=cl)" and two.licence == "https://cc.example/by"
        assert self._query(server)["safe"] == "active"
        assert self._query(server)["engine"] == "google_images" and self._query(server)["licenses"] == "cl"
        server.pages["/s"] = self._page(
            {"search_metadata": {"status": "Success"}, "error": "no results for this query"}
        )
        assert source.search("hall", 5) == []
        server.pages["/s"] = self._page({"search_metadata": {"status": "Error"}, "error": "failed for SECRETKEY"})
        with pytest.raises(KoreError, match="failed for …"):
            source.search("hall", 5)

    def test_keys_must_be_in_the_environment(self, server, monkeypatch):
        for name in ("GOOGLE_API_KEY", "GOOGLE_CSE_ID", "SERPAPI_API_KEY"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(ConfigError, match="GOOGLE_API_KEY"):
            Google(server.downloader())
        with pytest.raises(ConfigError, match="SERPAPI_API_KEY"):
            SerpApi(server.downloader())


class Fixed:
    """A search with fixed results that counts its calls."""

    def __init__(self, *candidates):
        self.candidates, self.calls, self.error = candidates, 0, None

    def identity(self):
        return {"kind": "fixed"}

    def search(self, query, count):
        self.calls += 1
        if self.error:
            raise self.error
        return self.candidates


class TestFinder:
    def test_good_images_survive_bad_ones_and_nothing_is_asked_twice(self, server, cache, tmp_path):
        for seed in (1, 2):
            server.pages[f"/{seed}.png"] = save(scene(seed), tmp_path / f"{seed}.png").read_bytes()
        server.pages["/cut.png"] = server.pages["/1.png"][:200]
        server.pages["/svg"] = b"<svg/>" + b" " * 300
        server.pages["/inside"] = lambda handler: handler.answer(302, Location="http://169.254.169.254/?key=SECRET")
        server.pages["/403.png"] = lambda handler: handler.answer(403)
        names = ["404.png", "cut.png", "1.png", "svg", "inside", "403.png", "2.png"]
        source = Fixed(*[Candidate(server.url(f"/{name}?sig=SECRET"), title=name) for name in names])

        def images():
            return Images(source, ImageStore(tmp_path / "store", server.downloader()), cache, results=7)

        finder = images()
        found = finder.find("a hall", save(scene(9), tmp_path / "original.png"))
        assert [image.candidate.title for image, _ in found] == ["1.png", "2.png"]
        assert all(isinstance(problem, Problem) and problem.query == "a hall" for problem in finder.problems)
        reasons = {problem.place.rpartition("/")[2].partition("?")[0]: problem.reason for problem in finder.problems}
        assert sorted(reasons) == ["403.png", "404.png", "cut.png", "inside", "svg"]
        assert "answers 404" in reasons["404.png"] and "cannot be decoded" in reasons["cut.png"]
        assert "an SVG drawing" in reasons["svg"] and "not on the list" in reasons["inside"]
        assert "SECRET" not in repr(finder.problems)
        asked = len(server.asked)
        again = images()
        assert again.find("a hall", tmp_path / "original.png") == found
        assert again.problems == finder.problems and source.calls == 1
        # What the allowlist or a server refused is tried again: either may have changed its mind.
        assert [path.partition("?")[0] for path, _ in server.asked[asked:]] == ["/inside", "/403.png"]

    def test_an_image_lost_from_the_store_is_fetched_again(self, server, cache, tmp_path):
        server.pages["/1.png"] = save(scene(1), tmp_path / "1.png").read_bytes()
        finder = Images(
            Fixed(Candidate(server.url("/1.png"))), ImageStore(tmp_path / "store", server.downloader()), cache
        )
        [(image, _)] = finder.find("a hall")
        image.path.unlink()
        assert finder.find("a hall") == [(image, None)] and image.path.is_file()

    def test_passing_failures_are_not_remembered(self, server, cache, tmp_path):
        server.pages["/1.png"] = lambda handler: handler.answer(503)
        source = Fixed(Candidate(server.url("/1.png")))
        finder = Images(source, ImageStore(tmp_path / "store", server.downloader()), cache)
        with pytest.raises(Unavailable, match="a hall"):
            finder.find("a hall")
        server.pages["/1.png"] = picture("PNG")
        assert len(finder.find("a hall")) == 1
        source.error = Unavailable("not now")
        with pytest.raises(Unavailable, match="not now"):
            finder.find("another hall")

    def test_without_a_search_nothing_is_found(self, cache, tmp_path):
        images = make_images(ImageSettings(), tmp_path / "store", cache)
        assert images.find("a hall") == [] and images.store.download is None
        assert images.store.keep(save(scene(1), tmp_path / "a.png")).path.is_file()

    def test_a_local_folder_needs_no_network(self, cache, tmp_path):
        for seed, name in enumerate(["red fox", "a fox", "owl"]):
            save(scene(seed), tmp_path / "in" / f"{name}.png")
        images = make_images(ImageSettings(kind="folder", path=tmp_path / "in"), tmp_path / "store", cache)
        assert images.store.download is None
        found = images.find("red fox", tmp_path / "in" / "a fox.png")
        assert [image.candidate.title for image, _ in found] == ["red fox"]

    def test_threads_find_the_same(self, server, cache, tmp_path):
        for seed in range(4):
            server.pages[f"/{seed}.png"] = save(scene(seed), tmp_path / f"{seed}.png").read_bytes()
        source = Fixed(*[Candidate(server.url(f"/{seed}.png")) for seed in range(4)])
        finder = Images(source, ImageStore(tmp_path / "store", server.downloader()), cache)
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda _: finder.find("a hall"), range(16)))
        assert all(result == results[0] for result in results) and len(results[0]) == 2


class TestSettings:
    def test_each_kind_says_what_it_needs(self, tmp_path):
        for wrong, said in [
            ({"kind": "folder"}, "needs path"),
            ({"kind": "google"}, "needs allow"),
            ({"kind": "serpapi"}, "needs allow"),
            ({"kind": "commons"}, "needs contact"),
            ({"kind": "commons", "contact": "me"}, "an e-mail address or the URL of a page"),
            ({"kind": "bing"}, "kind"),
            ({"index": True}, "index needs"),
            ({"allow": ["https://example.org"]}, "expected a host such as"),
            ({"delays": 1}, "delays"),
        ]:
            with pytest.raises(ValidationError, match=said):
                ImageSettings(**wrong)

    def test_downloads_reach_public_hosts_of_the_list_only(self, cache, tmp_path, monkeypatch):
        settings = ImageSettings(kind="commons", contact="me@example.org")
        images = make_images(settings, tmp_path, cache)
        assert images.store.download.allow == Allowlist(("thumb.wikimedia.org", "upload.wikimedia.org"))
        assert "me@example.org" in images.store.download.agent
        assert images.source._download.allow == Allowlist(("commons.wikimedia.org",))
        assert "me@example.org" in images.source._download.agent
        monkeypatch.setenv("SERPAPI_API_KEY", "SECRETKEY")
        settings = ImageSettings(kind="serpapi", allow=["*"], max_bytes=1000)
        images = make_images(settings, tmp_path, cache)
        assert images.store.download.allow == Allowlist(("*",)) and images.store.download.limits.max_bytes == 1000
        assert "SECRETKEY" not in repr(vars(images)) + repr(settings)
        with pytest.raises(KoreError, match="not a public address"):
            images.store.fetch(Candidate("http://127.0.0.1/a.jpg"))


def tiny_clip(folder: Path, seed: int = 0) -> Path:
    """A random CLIP of the real classes on disk: 28-pixel images, 16 dimensions."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shape, "vocab_size": 120, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**shape, "image_size": 28, "patch_size": 14}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    with torch.no_grad():  # random towers of this size give nearly one embedding for all images
        for weight in model.vision_model.embeddings.parameters():
            weight.mul_(30)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(unk_token="<e>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<s>", "<e>"], show_progress=False)
    tokenizer.train_from_iterator(["a red fox and a grey owl"] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A <e>", special_tokens=[("<s>", 0), ("<e>", 1)])
    special = {"bos_token": "<s>", "eos_token": "<e>", "pad_token": "<e>", "unk_token": "<e>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special).save_pretrained(folder)
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


class TestClip:
    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory):
        return tiny_clip(tmp_path_factory.mktemp("clip"))

    @pytest.fixture
    def pictures(self, tmp_path):
        return [save(scene(seed), tmp_path / "in" / f"{seed}.png") for seed in range(5)]

    def test_similarities_are_cosines_of_the_model(self, model, pictures, cache):
        import torch
        from transformers import CLIPModel

        from kore.augmentation.images import ClipSimilarity
        from kore.models import load_image_processor

        clip = ClipSimilarity(str(model), "cpu", cache)
        values = clip.similarities(pictures[0], pictures)
        processor = load_image_processor(model, pillow=True)
        pixels = processor([Image.open(path).convert("RGB") for path in pictures], return_tensors="pt")["pixel_values"]
        plain = CLIPModel.from_pretrained(model)
        with torch.inference_mode():
            features = plain.visual_projection(plain.vision_model(pixels).pooler_output)
        expected = torch.nn.functional.cosine_similarity(features[:1], features).tolist()
        assert values == pytest.approx(expected, abs=1e-5) and values[0] == pytest.approx(1, abs=1e-6)
        assert len({round(value, 3) for value in values}) > 2

    def test_embeddings_are_kept_by_content(self, model, pictures, cache, monkeypatch):
        from kore.augmentation.images import Clip

        first = Clip(str(model), "cpu", cache).similarities(pictures[0], pictures[1:])
        again = Clip(str(model), "cpu", cache)
        monkeypatch.setattr(again, "_embed_images", lambda pixels: pytest.fail("computed again"))
        assert again.similarities(pictures[0], pictures[1:]) == first
        assert Clip(str(model), "cpu").similarities(pictures[0], pictures[4:0:-1]) == first[::-1]

    def test_an_index_is_computed_once(self, model, pictures, cache, tmp_path, monkeypatch):
        from kore.augmentation.images import Clip

        (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG nothing")
        clip = Clip(str(model), "cpu")
        source = FolderSource(tmp_path / "in", tmp_path / "index", clip)
        found = source.search("a red fox", 3)
        images = numpy.stack(clip.images(pictures))
        order = numpy.argsort(-(images @ clip.text("a red fox")), kind="stable")
        assert [candidate.path for candidate in found] == [pictures[row] for row in order[:3]]
        clip.text("a red fox " * 50)
        assert source.method == "clip" and list(source.skipped) == ["broken.png"]
        monkeypatch.setattr(Clip, "_embed_images", lambda *_: pytest.fail("computed again"))
        again = FolderSource(tmp_path / "in", tmp_path / "index", Clip(str(model), "cpu"))
        assert again.search("a red fox", 3) == found and again.identity() == source.identity()

    def test_an_index_that_was_cut_short_is_finished(self, model, pictures, tmp_path, monkeypatch):
        from kore.augmentation.images import Clip, folder

        embed, seen = Clip._embed_images, []

        def until_killed(self, pixels):
            seen.extend(pixels)
            if len(seen) == 4:
                raise KeyboardInterrupt
            return embed(self, pixels)

        monkeypatch.setattr(folder, "_SAVE_EVERY", 0.0)
        monkeypatch.setattr(folder, "_BLOCK", 1)
        monkeypatch.setattr(Clip, "_embed_images", until_killed)
        with pytest.raises(KeyboardInterrupt):
            FolderSource(tmp_path / "in", tmp_path / "index", Clip(str(model), "cpu")).search("a fox", 3)
        found = FolderSource(tmp_path / "in", tmp_path / "index", Clip(str(model), "cpu")).search("a fox", 3)
        assert len(seen) == 6 and len(found) == 3
        monkeypatch.setattr(Clip, "_embed_images", embed)
        assert FolderSource(tmp_path / "in", tmp_path / "other", Clip(str(model), "cpu")).search("a fox", 3) == found

    def test_an_index_holds_for_its_model_and_its_images(self, model, pictures, tmp_path, monkeypatch):
        from kore.augmentation.images import Clip

        def source(clip):
            return FolderSource(tmp_path / "in", tmp_path / "index", Clip(str(clip), "cpu"))

        first = source(model).identity()
        other = source(tiny_clip(tmp_path / "other", seed=1)).identity()
        assert first["weights"] != other["weights"] and first["content"] == other["content"]
        save(scene(77), pictures[0])
        changed = source(model)
        assert changed.identity()["content"] != first["content"]
        assert changed.search("a fox", 5) == FolderSource(
            tmp_path / "in", tmp_path / "fresh", Clip(str(model), "cpu")
        ).search("a fox", 5)

    def test_equal_scores_stay_in_the_order_of_the_folder(self, model, pictures, tmp_path):
        from kore.augmentation.images import Clip

        for path in pictures:
            save(scene(1), path)
        source = FolderSource(tmp_path / "in", tmp_path / "index", Clip(str(model), "cpu"))
        assert [candidate.path for candidate in source.search("a fox", 5)] == pictures

    def test_the_search_and_the_choice_together(self, model, pictures, cache, tmp_path):
        settings = ImageSettings(
            kind="folder", path=tmp_path / "in", clip=str(model), index=True, device="cpu", results=5
        )
        finder = make_images(settings, tmp_path / "store", cache)
        found = finder.find("a grey owl", pictures[2])
        values = [value for _, value in found]
        assert len(found) == 2 and values == sorted(values, reverse=True) and all(value < 1 for value in values)
        assert "2" not in [image.candidate.title for image, _ in found]
        again = make_images(settings, tmp_path / "store", cache)
        assert again.find("a grey owl", pictures[2]) == found

    def test_what_is_no_clip_model(self, tmp_path):
        from kore.augmentation.images import Clip

        with pytest.raises(ModelError, match="the CLIP model cannot be loaded"):
            Clip(str(tmp_path / "nowhere"), "cpu").identity()
