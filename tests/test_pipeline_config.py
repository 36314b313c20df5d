"""The run configuration: what it accepts, and what it says about what it does not."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from kore.errors import ConfigError
from kore.pipeline.loading import dump_config, known_keys, load_config

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.yaml"))

GOOD = """
    output_dir: run
    seed: 3
    model:
      path: model
    old:
      files: old.json
    adapter:
      rank: 8
    new:
      files: [new.json]
      image_root: images
    train:
      learning_rate: 1e-2
    eval:
      new:
        - {name: facts, file: facts.jsonl}
      old: old.jsonl
"""


@pytest.fixture
def folder(tmp_path):
    for name in ("old.json", "new.json", "facts.jsonl", "old.jsonl"):
        (tmp_path / name).write_text("[]")
    for name in ("model", "images"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def load(folder):
    def load_text(text=GOOD, *overrides, **changes):
        for old, new in changes.get("replace", {}).items():
            assert old in text
            text = text.replace(old, new)
        (folder / "run.yaml").write_text(textwrap.dedent(text))
        return load_config(folder / "run.yaml", overrides)

    return load_text


def test_paths_are_taken_from_the_file_and_overrides_from_the_working_directory(
    load, folder, tmp_path_factory, monkeypatch
):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "mine.json").write_text("[]")
    monkeypatch.chdir(elsewhere)
    config = load(GOOD, "old.files=mine.json", "output_dir=out")
    assert config.model.path == str(folder / "model")
    assert config.new.files == [folder / "new.json"] and config.new.image_root == folder / "images"
    assert config.old.files == [elsewhere / "mine.json"]
    assert config.output_dir == elsewhere / "out"
    assert config.eval.old[0].file == folder / "old.jsonl" and config.eval.old[0].name == "old"


def test_overrides_reach_everything(load):
    config = load(GOOD, "train.epochs=2", "adapter.rank=match-lora-16", "eval.new.0.name=other", "capture.batch_size=7")
    assert (config.train.epochs, config.adapter.rank, config.capture.batch_size) == (2, "match-lora-16", 7)
    assert config.eval.new[0].name == "other"
    assert load(GOOD, "train.learning_rate=1e-3").train.learning_rate == 1e-3


def test_one_seed_for_all_unless_training_has_its_own(load):
    assert load().train.seed == 3
    assert load(GOOD, "train.seed=9").train.seed == 9
    assert load(GOOD, "seed=4").train.seed == 4


def test_the_written_configuration_reads_back_the_same(load, folder):
    config = load()
    (folder / "again").mkdir()
    (folder / "again" / "config.yaml").write_text(dump_config(config))
    assert load_config(folder / "again" / "config.yaml") == config


def test_a_hub_id_is_left_alone(load):
    assert load(GOOD, "model.path=owner/name").model.path == "owner/name"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "learning_rate: 1e-2",
            "learning_rat: 1",
            r"run.yaml:14: unknown key train.learning_rat; did you mean train.learning_rate\?",
        ),
        ("adapter:\n", "adaptor:\n", r"run.yaml:8: unknown key adaptor; did you mean adapter\?"),
        ("seed: 3", "rank: 3", r"run.yaml:3: unknown key rank; did you mean adapter.rank\?"),
        ("name: facts", "title: facts", r"run.yaml:17: unknown key eval.new.0.title; did you mean eval.new.0.file"),
        ("rank: 8", "rank: 0", r"run.yaml:9: adapter.rank: expected a whole number of 1 or more, .*, got 0"),
        (
            "rank: 8",
            "method: koer",
            r"run.yaml:9: adapter.method: expected one of kore, lora, .*lora-null-v2.*, got 'koer'",
        ),
        ("1e-2", "fast", r"run.yaml:14: train.learning_rate: expected a valid number, got 'fast'"),
        ("files: old.json", "files: gone.json", r"run.yaml:7: old.files.0: no such file: .*gone.json"),
        ("image_root: images", "image_root: gone", r"run.yaml:12: new.image_root: no such directory: .*gone"),
        ("path: model", "path: ./gone", r"run.yaml:5: model.path: no such model directory: .*gone"),
        ("path: model", "dtype: auto", r"run.yaml:4: missing key model.path"),
        ("rank: 8", "rank: [8", r"run.yaml:\d+: not valid YAML"),
        ("old.jsonl", "{name: a/b, file: old.jsonl}", r"run.yaml:18: eval.old.0.name: expected a short name"),
        ("old.jsonl", "[old.jsonl, old.jsonl]", r"run.yaml:15: eval: two question sets are named 'old'"),
        ("  files: old.json\n", "  format: llava\n", r"run.yaml:6: missing key old.files"),
    ],
)
def test_every_mistake_is_named_with_its_place(load, old, new, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(replace={old: new})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"command line: unknown key train.epoch; did you mean train.epochs\?"),
        ("nonsense", r"'nonsense': expected an override of the form section.key=value"),
        ("eval.new.4.file=x", r"there is no list entry 4; the list has 1"),
        ("seed.deep=3", r"'deep' is not inside a section"),
        ("model=null", r"command line: model: expected a section with keys of its own"),
        ("old=null", r"old: method kore needs old data"),
        ("old.files=gone.json", r"command line: old.files.0: no such file"),
        ("train.epochs=[1", r"the value is not valid YAML"),
    ],
)
def test_mistakes_on_the_command_line(load, override, message):
    with pytest.raises(ConfigError, match=message):
        load(GOOD, override)


def test_a_missing_file_and_an_empty_one(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "gone.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match="expected sections"):
        load_config(tmp_path / "empty.yaml")


def test_other_methods_need_no_old_data(load):
    assert load(GOOD, "old=null", "adapter.method=lora").old is None


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid(example):
    config = load_config(example, check_paths=False)
    assert config.eval.new and config.eval.old


def test_the_variants_that_examples_name_are_valid():
    """The comment lines `key=value key=value   what it is`."""
    count = 0
    for example in EXAMPLES:
        for line in example.read_text(encoding="utf-8").splitlines():
            if line.startswith("#   ") and "=" in line.split()[1]:
                overrides = [
                    word for word in line.partition("  ")[2].strip().partition("   ")[0].split() if "=" in word
                ]
                load_config(example, overrides, check_paths=False)
                count += 1
    assert count == 7 * 3


def test_the_paper_s_settings_are_in_the_examples():
    folder = EXAMPLES[0].parent
    ranks = {"llava-1.5-7b.yaml": "match-lora-128", "llava-1.5-13b.yaml": "match-lora-128", "qwen2.5-vl-7b.yaml": 274}
    for name, rank in ranks.items():
        config = load_config(folder / name, check_paths=False)
        assert config.recipe == "paper" and config.adapter.rank == rank
        assert (config.old.max_samples, config.old.balance, len(config.old.files)) == (256, False, 4)
        train = config.train
        assert (train.learning_rate, train.projector_learning_rate, train.epochs) == (2e-4, 2e-5, 6)
        assert (train.scheduler, train.warmup_ratio, train.weight_decay) == ("cosine", 0.03, 0.0)


def test_old_data_of_several_files_are_groups_and_balanced_unless_said_otherwise(load, folder):
    (folder / "more").mkdir()
    (folder / "more" / "old.json").write_text("[]")
    one = load().old
    assert one.file_groups() == ["old"] and not one.balanced
    several = load(replace={"files: old.json": "files: [old.json, new.json]"}).old
    assert several.file_groups() == ["old", "new"] and several.balanced
    alike = load(replace={"files: old.json": "files: [old.json, more/old.json]"}).old
    assert alike.file_groups() == [str(folder / "old.json"), str(folder / "more" / "old.json")] and alike.balanced
    for settings, balanced in (("groups: [a, a]", False), ("groups: [a, b]", True), ("balance: false", False)):
        text = f"files: [old.json, new.json]\n      {settings}"
        assert load(replace={"files: old.json": text}).old.balanced == balanced
    for settings, message in (
        ("files: old.json\n      balance: true", r"run.yaml:6: old: balance: there is one group"),
        (
            "files: old.json\n      groups: [a, b]",
            r"run.yaml:6: old: groups: expected one name for .* 1 files, got 2",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            load(replace={"files: old.json": settings})


def test_every_key_is_reachable_by_its_dotted_name():
    keys = known_keys()
    assert {"model.path", "old.files", "adapter.rank", "train.learning_rate", "eval.new.file"} <= set(keys)
    assert len(set(keys)) == len(keys)
