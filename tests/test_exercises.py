"""results/exercises.py and results/challenge.py: their changes still fit the code, what counts as
an entry and what does not."""

import importlib
import re
import sys

import pytest

from conftest import ROOT, result_line, run_script, wrong_call

sys.path.insert(0, str(ROOT / "results"))
exercises, challenge = map(importlib.import_module, ("exercises", "challenge"))
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("attempt", exercises.TRIES, ids=lambda attempt: attempt.what)
def test_a_change_fits_the_code_and_the_exercise_is_on_the_page(attempt):
    if attempt.file:
        text = (ROOT / attempt.file).read_text()
        assert text.count(attempt.code) == 1
        compile(text.replace(attempt.code, attempt.instead), attempt.file, "exec")
    assert (ROOT / attempt.command.split()[0]).exists()
    assert re.search(rf"^\| {attempt.exercise} \|", README, re.M)


def test_the_answers_are_those_of_all_tries_in_their_order():
    rows = exercises.read(exercises.TABLE)
    assert [(row["exercise"], row["what"]) for row in rows] == [
        (str(attempt.exercise), attempt.what) for attempt in exercises.TRIES]


def test_an_entry_is_a_script_like_03_and_other_seeds_do_not_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_script("results/challenge.py", "--seeds", 300, "--out", tmp_path, "--name", "short",
                      "--", "03_step_loss.py", "--iterations", 1, "--episodes", 64, cwd=tmp_path)
    told = result_line(done)
    assert (told["valid"], told["episodes"]) == ("no", 64) and 0 < told["success"] < 0.9
    row, = exercises.read(tmp_path / "entries.csv")
    assert (row["name"], row["valid"], row["seeds"]) == ("short", "no", "300")
    assert float(row["each"]) == pytest.approx(told["success"], abs=6e-4)
    assert not (tmp_path / "runs").exists()  # the clone is where the entry looks for it
    with pytest.raises(SystemExit, match="results/study.py --seed 300 is no entry"):
        challenge.run(["results/study.py"], 300)


@pytest.mark.parametrize("flags, named", [
    ("", "entry"), ("no_such_file.py", "entry"), ("--seeds -1 -- 03_step_loss.py", "--seeds")])
def test_a_wrong_call_of_the_challenge_is_one_line(flags, named):
    assert named in wrong_call("challenge.py", *flags.split())


def test_a_wrong_number_of_an_exercise_is_one_line():
    assert "exercises [12]" in wrong_call("exercises.py", "12")
