"""course/: the changes of its exercises still fit the code, each exercise says how hard and how
long it is and what comes out, the curves are those of the bugs; what counts as an entry to the
challenge and what does not."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ROOT, result_line, run_main, run_script, wrong_call
from course import challenge, exercises, find_the_bug
from tools.log import read_log

PAGE = (ROOT / "course/README.md").read_text()
NAMED = {path.name: path.read_text() for path in (ROOT / "course").glob("**/*.md")}
EXERCISES = dict(re.findall(r"^### (\d+)\. .*\n((?:(?!^###? ).*\n)*)", PAGE, re.M))
LINES = re.findall(r"^\| ([a-f]) \| `(\w+)` \(03\) \| `(.*)` \|$", PAGE, re.M)


# ------------------------------------------------------------------------------------------------
# The page


def test_every_exercise_has_difficulty_minutes_and_an_answer():
    assert [int(number) for number in EXERCISES] == list(range(1, 17))
    for number, text in EXERCISES.items():
        assert re.match(r"\n★{1,3} · \d+ minutes\b", text), number
        hidden = re.findall(r"<summary>([^<]*)</summary>\n\n(.*?)\n\n</details>", text, re.S)
        names = [name for name, _ in hidden]
        assert names in (["Answer"], ["Hint", "Answer"]), number
        assert all(len(content) > 60 for _, content in hidden), number


def test_every_project_says_that_it_is_one():
    section = PAGE.split("### Projects")[1]
    assert "no reference solution" in section
    rows = re.findall(r"^\| (\d+) \| ★{1,3} \| (?:half a day|a day|two days) \|", section, re.M)
    assert rows == ["17", "18", "19", "20"]


def test_the_pages_can_be_read():
    for name, text in NAMED.items():
        for line in text.split("\n"):
            assert len(line) <= 400 or line.startswith("|"), (name, line)
        for part in re.split(r"\n\s*\n", re.sub(r"```.*?```|^\|.*$", "", text, flags=re.S | re.M)):
            assert len(part.split()) <= 70, (name, part)


def test_the_answers_tell_the_numbers_of_the_table():
    """Each success of answers.csv, and what it is compared with, stands in its folded answer."""
    for row in exercises.read(exercises.TABLE):
        answer = EXERCISES[row["exercise"]].split("<summary>Answer</summary>")[1]
        for column in ("success", "beside"):
            assert f"{float(row[column]):.3f}" in answer, (row, column)


def test_the_table_of_symptoms_holds_the_eight_logs():
    """Its ranges, first iteration and later ones, against the logs of results/toy."""
    logs = [read_log(path) for path in sorted((ROOT / "results/toy").glob("seed?.csv"))]
    assert len(logs) == 8
    section = PAGE.split("## If you see X")[1].split("\n## ")[0]
    for column in ("loss", "rank_accuracy", "margin", "drift"):
        line, = [text for text in section.split("\n") if text.startswith(f"| `{column}` |")]
        told = re.search(r"first ([\d.]+) to ([\d.]+), then ([\d.]+) to ([\d.]+)", line).groups()
        first, later = (np.concatenate([log[column][rows] for log in logs])
                        for rows in (slice(0, 1), slice(1, None)))
        for values, (low, high) in ((first, told[:2]), (later, told[2:])):
            slack = 10 ** -len(low.split(".")[1])  # the range is the logs', rounded outwards
            assert float(low) <= values.min() < float(low) + slack, (column, values.min())
            assert float(high) - slack < values.max() <= float(high), (column, values.max())
    low, high = re.search(r"\| `grad_norm` \| ([\d.]+) to ([\d.]+)", section).groups()
    norms = np.concatenate([log["grad_norm"] for log in logs])
    assert float(low) <= norms.min() and norms.max() <= float(high) < 2 * norms.max()
    assert max(log["clipped"].max() for log in logs) < 0.005


# ------------------------------------------------------------------------------------------------
# The exercises


@pytest.mark.parametrize("attempt", exercises.TRIES, ids=lambda attempt: attempt.what)
def test_a_change_fits_the_code_and_the_exercise_is_on_the_page(attempt, tmp_path):
    if attempt.file:
        text, copy = (ROOT / attempt.file).read_text(), tmp_path / attempt.file
        copy.write_text(text)
        exercises.exchange(copy, attempt.code, attempt.instead)
        assert text.count(attempt.code) == 1 and copy.read_text() != text
        compile(copy.read_text(), attempt.file, "exec")
    assert (ROOT / attempt.command.split()[0]).exists()
    assert str(attempt.exercise) in EXERCISES


def test_a_change_that_fits_twice_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    with pytest.raises(AssertionError, match="not once in a.py"):
        exercises.exchange(tmp_path / "a.py", "x = 1", "x = 2")


def test_the_answers_are_those_of_all_tries_in_their_order():
    rows = exercises.read(exercises.TABLE)
    assert [(row["exercise"], row["what"]) for row in rows] == [
        (str(attempt.exercise), attempt.what) for attempt in exercises.TRIES]


def test_a_wrong_number_of_an_exercise_is_one_line():
    assert "exercises [14]" in wrong_call("course/exercises.py", "14")


# ------------------------------------------------------------------------------------------------
# Find the bug


def test_the_lines_to_choose_from_are_in_03_and_three_of_them_are_the_bugs():
    code = (ROOT / "03_step_loss.py").read_text()
    assert [letter for letter, *_ in LINES] == list("abcdef")
    for _, function, line in LINES:
        body = code.split(f"\ndef {function}(")[1].split("\ndef ")[0]
        assert body.count(line) == 1, line
    assert len({bug.function for bug in find_the_bug.BUGS}) == 3


@pytest.mark.parametrize("bug", find_the_bug.BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_one_of_the_lines_and_its_answer_names_it(bug):
    """The planted mistake changes that line of the page and no other."""
    module, name, mistaken = find_the_bug.planted(bug)
    assert (module, name) == (find_the_bug.nft, bug.function)
    assert callable(mistaken) and mistaken is not getattr(module, name)
    found, = [(what, code, mistake) for (_, function, _), mistakes in
              find_the_bug.known.MUTANTS.items() for what, code, mistake in mistakes
              if (function, what) == (bug.function, bug.mistake)]
    letter, = [letter for letter, function, line in LINES
               if function == bug.function and found[1] in line]
    exercise = EXERCISES[str(14 + find_the_bug.BUGS.index(bug))]
    assert f"bugs/{bug.name}.png" in exercise
    assert f"**Line {letter}**" in exercise.split("<summary>Answer</summary>")[1]


def test_the_logs_are_there_and_differ_from_the_right_one_as_the_hints_say():
    right, *wrong = (read_log(find_the_bug.FOLDER / f"{name}.csv")
                     for name in ("right", "bug1", "bug2", "bug3"))
    columns = [column for column in right if column != "eval_ode"]
    for log in wrong:
        assert list(log) == list(right) and len(log["loss"]) == len(right["loss"]) == 160
        assert log["train_sde"][0] == right["train_sde"][0]  # the clone acts, whatever comes later
    first = [[column for column in columns if log[column][0] != right[column][0]] for log in wrong]
    assert first[1] == [] and {"loss", "drift"} < set(first[0]) & set(first[2])
    assert wrong[0]["drift"][0] > 10 * right["drift"][0]
    assert wrong[1]["eval_ode"][-1] < right["eval_ode"][-1] - 0.1
    assert wrong[2]["eval_ode"][-1] < 0.5
    toy = ROOT / "results/toy/seed0.csv"  # the same run
    assert (find_the_bug.FOLDER / "right.csv").read_text() == toy.read_text()


def test_the_curves_are_made_by_the_real_script(workplace, monkeypatch):
    """Two short iterations: with a bug that changes nothing in the first one, the first row is that
    of the script itself; its second is not, and the mistake does not stay in 03."""
    monkeypatch.setattr(find_the_bug, "ROOT", workplace)
    flags = ("--iterations", "2", "--episodes", "32")
    real = find_the_bug.nft.ema_update
    for name, bug in (("right", None), ("wrong", find_the_bug.BUGS[1])):
        find_the_bug.train(workplace / f"{name}.csv", bug, flags)
    assert find_the_bug.nft.ema_update is real
    rows = {}
    for name in ("right", "wrong"):
        with open(workplace / f"{name}.csv", newline="") as file:
            rows[name] = list(csv.DictReader(file))
    assert rows["right"][0] == rows["wrong"][0] and rows["right"][1] != rows["wrong"][1]
    done = run_script("03_step_loss.py", *flags, "--out", workplace / "own", cwd=workplace)
    assert "RESULT" in done.stdout
    with open(workplace / "own/log.csv", newline="") as file:
        assert list(csv.DictReader(file)) == rows["right"]
    find_the_bug.draw(*(read_log(workplace / f"{name}.csv") for name in rows),
                      workplace / "curves.png")
    assert (workplace / "curves.png").stat().st_size > 10_000


# ------------------------------------------------------------------------------------------------
# The challenge


def test_an_entry_is_a_script_like_03_and_other_seeds_do_not_count(workplace, monkeypatch):
    """In a repo that has its clone already."""
    (workplace / "elsewhere").mkdir()
    monkeypatch.chdir(workplace / "elsewhere")
    monkeypatch.setattr(challenge, "ROOT", workplace)
    entry = str(ROOT / "03_step_loss.py")
    code, out, _ = run_main("course/challenge.py", "--seeds", 0, "--out", ".", "--name", "short",
                            "--", entry, "--iterations", 1, "--episodes", 64)
    told = result_line(SimpleNamespace(stdout=out))
    assert (told["valid"], told["episodes"]) == ("no", 64) and 0 < told["success"] < 0.9
    row, = exercises.read("entries.csv")
    assert (row["name"], row["valid"], row["seeds"]) == ("short", "no", "0") and code is None
    assert float(row["each"]) == pytest.approx(told["success"], abs=6e-4)
    assert not Path("runs").exists()  # the clone is where the entry looks for it
    (workplace / "nothing.py").touch()
    with pytest.raises(SystemExit, match="nothing.py --seed 0 is no entry"):
        challenge.run(["nothing.py"], 0)


def test_the_table_of_entries_stands_near_the_top_of_its_page():
    head, _, rest = NAMED["challenge.md"].partition("<!-- table: course/entries.csv")
    assert rest and len(head.split()) < 120
    rows = exercises.read(ROOT / "course/entries.csv")
    assert "yes" in {row["valid"] for row in rows}
    assert all(row["seeds"] == "200 201 202 203 204" for row in rows)


@pytest.mark.parametrize("flags, named", [
    ("", "entry"), ("no_such_file.py", "entry"), ("--seeds -1 -- 03_step_loss.py", "--seeds")])
def test_a_wrong_call_of_the_challenge_is_one_line(flags, named):
    assert named in wrong_call("course/challenge.py", *flags.split())


def test_zero_noise_is_what_exercise_3_evaluates(monkeypatch, tmp_path):
    """A policy whose velocity keeps x_t where it is ends where it began: at 0, and nowhere else."""
    policy = exercises.flow.FlowPolicy(horizon=4, action_dim=2, state_dim=3)
    for parameter in policy.parameters():
        torch.nn.init.zeros_(parameter)
    (tmp_path / "runs/exercise").mkdir(parents=True)
    torch.save(policy.state_dict(), tmp_path / "runs/exercise/policy.pt")
    monkeypatch.setattr(exercises, "run", lambda command, folder: None)
    success, beside, remark = exercises.from_zero("01_flow_policy.py", tmp_path)
    assert success == 0 and "x_1 = 0 0.0" in remark  # a robot that rests never arrives
    spread = float(re.search(r"spread ([\d.]+)", remark)[1])
    assert spread == pytest.approx(1, abs=0.02)      # the noise itself
