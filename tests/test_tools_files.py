"""tools/files.py: files that are whole or not there, folders that are one run's."""

import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from tools import files


def test_a_file_comes_back_and_nothing_else_is_left(tmp_path):
    files.save({"x": torch.arange(3)}, tmp_path / "a.pt")
    assert files.load(tmp_path / "a.pt")["x"].tolist() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("error, words", [
    (OSError(28, "No space left on device"), "No space left"),
    (RuntimeError("unexpected pos 128 vs 0"), "disk full")])
def test_a_save_that_fails_leaves_what_stood_there_and_one_line(tmp_path, monkeypatch, error, words):
    files.save({"x": 1}, tmp_path / "a.pt")

    def dies_halfway(content, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", dies_halfway)
    with pytest.raises(SystemExit) as stopped:
        files.save({"x": 2}, tmp_path / "a.pt")
    assert words in str(stopped.value) and "\n" not in str(stopped.value)
    assert files.load(tmp_path / "a.pt") == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_broken_file_is_one_line_that_names_it(tmp_path):
    files.save({"x": torch.randn(1000)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    for content in (whole[:1000], b"", b"no checkpoint at all"):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(SystemExit) as stopped:
            files.load(tmp_path / "a.pt")
        assert str(tmp_path / "a.pt") in str(stopped.value) and "\n" not in str(stopped.value)
    with pytest.raises(SystemExit):
        files.load(tmp_path / "none.pt")


def test_a_folder_is_made_or_one_line_says_why_not(tmp_path):
    assert files.make_folder(tmp_path / "a" / "b").is_dir()
    assert files.make_folder(tmp_path / "a").is_dir()             # there already
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        files.make_folder(tmp_path / "file" / "b")
    assert str(tmp_path / "file" / "b") in str(stopped.value) and "\n" not in str(stopped.value)


def test_a_folder_belongs_to_one_process_until_it_ends(tmp_path):
    """This process may ask again; another is refused, but may have it once this one is done."""
    claim = ("import sys; from pathlib import Path; from tools import files; "
             "print(files.lock(Path(sys.argv[1])), flush=True); sys.stdin.read()")
    command = [sys.executable, "-c", claim, str(tmp_path)]
    other = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert other.stdout.readline() == "True\n"
    assert not files.lock(tmp_path)
    other.communicate("")
    assert other.returncode == 0 and not list(tmp_path.iterdir())
    assert files.lock(tmp_path) and files.lock(tmp_path)
    files.HELD.pop(tmp_path.resolve()).close()


def test_under_torchrun_rank_0_claims_for_all(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert files.lock(tmp_path) and not list(tmp_path.iterdir())
