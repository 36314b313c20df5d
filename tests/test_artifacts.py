from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from kore.artifacts import (
    atomic_directory,
    atomic_write,
    load_tensors,
    read_manifest,
    save_tensors,
    write_manifest,
)
from kore.errors import ArtifactError


def write(path, value):
    with atomic_directory(path) as directory:
        save_tensors({"x": torch.full((4, 3), float(value))}, directory / "x.safetensors")
        write_manifest(directory, "sample", {"value": value})


def test_round_trip_and_replacement(tmp_path):
    for value in (1, 2):
        write(tmp_path / "a", value)
        assert read_manifest(tmp_path / "a", "sample")["value"] == value
        assert torch.equal(load_tensors(tmp_path / "a" / "x.safetensors")["x"], torch.full((4, 3), float(value)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_replacement_without_renameat2(tmp_path, monkeypatch):
    monkeypatch.setattr("kore.artifacts._exchange", lambda new, old: False)
    write(tmp_path / "a", 1)
    write(tmp_path / "a", 2)
    assert read_manifest(tmp_path / "a", "sample")["value"] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_failed_write_leaves_the_old_artifact(tmp_path):
    write(tmp_path / "a", 1)
    with pytest.raises(RuntimeError, match="stop"), atomic_directory(tmp_path / "a") as directory:
        (directory / "half").write_text("half")
        raise RuntimeError("stop")
    assert read_manifest(tmp_path / "a", "sample")["value"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_killed_write_leaves_the_old_artifact_and_is_cleaned_up(tmp_path):
    write(tmp_path / "a", 1)
    script = f"""
        import os, signal
        from kore.artifacts import atomic_directory
        with atomic_directory({str(tmp_path / "a")!r}) as directory:
            (directory / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=os.getcwd())
    assert done.returncode == -signal.SIGKILL
    assert read_manifest(tmp_path / "a", "sample")["value"] == 1
    assert len(list(tmp_path.iterdir())) == 2
    write(tmp_path / "a", 3)
    assert read_manifest(tmp_path / "a", "sample")["value"] == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_atomic_write_replaces_or_leaves(tmp_path):
    file = tmp_path / "deep" / "file.json"
    atomic_write(file, "old")
    with pytest.raises(TypeError):
        atomic_write(file, 3.5)
    assert file.read_text() == "old"
    atomic_write(file, b"new")
    assert file.read_text() == "new"
    assert [entry.name for entry in file.parent.iterdir()] == ["file.json"]


def flip_a_byte(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, "corrupt"),
        (lambda file: file.write_bytes(file.read_bytes()[:-7]), "truncated"),
        (lambda file: file.unlink(), "missing"),
    ],
)
def test_damage_is_found_and_the_file_named(tmp_path, damage, message):
    write(tmp_path / "a", 1)
    damage(tmp_path / "a" / "x.safetensors")
    with pytest.raises(ArtifactError, match=rf"x\.safetensors.*{message}"):
        read_manifest(tmp_path / "a", "sample")


def test_wrong_kind_newer_schema_and_missing_manifest(tmp_path):
    with pytest.raises(ArtifactError, match="no such sample directory"):
        read_manifest(tmp_path / "a", "sample")
    (tmp_path / "b").mkdir()
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        read_manifest(tmp_path / "b", "sample")
    write(tmp_path / "a", 1)
    with pytest.raises(ArtifactError, match="expected an artifact of kind 'covariance', found 'sample'"):
        read_manifest(tmp_path / "a", "covariance")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    (tmp_path / "a" / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 999}))
    with pytest.raises(ArtifactError, match="newer"):
        read_manifest(tmp_path / "a", "sample")
    (tmp_path / "a" / "manifest.json").write_text("{ broken")
    with pytest.raises(ArtifactError, match=r"manifest\.json: cannot be read as JSON"):
        read_manifest(tmp_path / "a", "sample")


def test_unreadable_tensors_are_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ArtifactError, match=r"x\.safetensors"):
        load_tensors(tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match=r"y\.safetensors: no such file"):
        load_tensors(tmp_path / "y.safetensors")


def test_two_machines_with_the_same_process_id_do_not_meet(tmp_path, monkeypatch):
    """As two containers on one file system: each writes a temporary file of its own."""
    target = tmp_path / "x.json"

    def pieces():
        yield "first"
        atomic_write(target, "second")
        yield ", whole"

    atomic_write(target, pieces())
    assert target.read_text() == "first, whole" and [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_manifest_is_the_same_written_in_pieces(tmp_path):
    for name in ("a/b", "a.txt", 'quo"te', "z"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for files in (None, [], [tmp_path / "z", tmp_path / "a.txt"]):
        write_manifest(tmp_path, "test", {"fields": {"x": [1]}}, files)
        text = (tmp_path / "manifest.json").read_text()
        assert text == json.dumps(json.loads(text), indent=2) + "\n"
        expected = ["a/b", "a.txt", 'quo"te', "z"] if files is None else sorted(path.name for path in files)
        assert list(read_manifest(tmp_path, "test")["files"]) == expected
