"""course/assignment.py: a copy without solutions; the reference gets full marks, an empty function
none; every planted mistake is called by its name; a loop, a hog and an exit end by themselves."""

import ast
import json
import re
import subprocess
import sys

import pytest

from conftest import ROOT, run_process, run_script, wrong_call
from course import assignment
from envs.gap_world import expert_demos

SHEETS = ("A", "B", "C")
TASKS = [task for sheet in SHEETS for task in assignment.tasks_of(sheet)]
TASK = {task.name: task for task in TASKS}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies")
    for sheet in SHEETS:
        assignment.make(folder / sheet, sheet)
    return folder


def with_function(source, name, text):
    """A file with another text in the place of one function."""
    node = next(node for node in ast.parse(source).body if getattr(node, "name", None) == name)
    lines = source.splitlines(keepends=True)
    lines[node.lineno - 1:node.end_lineno] = [text.rstrip() + "\n"]
    return "".join(lines)


def graded(folder, name, text):
    """What the grader says of a copy of the reference in which a function reads like that."""
    path = folder / TASK[name].file
    path.write_text(with_function((ROOT / TASK[name].file).read_text(), name, text))
    return assignment.grade_one(path, name)


def source_of(name):
    text = (ROOT / TASK[name].file).read_text()
    node = next(node for node in ast.parse(text).body if getattr(node, "name", None) == name)
    return ast.get_source_segment(text, node)


@pytest.mark.parametrize("sheet", SHEETS)
def test_an_empty_copy_has_no_points_and_the_reference_all_of_them(copies, sheet, capsys):
    tasks, folder = assignment.tasks_of(sheet), copies / sheet
    assert tasks and assignment.grade(folder, tasks) == 0
    told = json.loads((folder / "results.json").read_text())
    assert all(test["score"] == 0 and "NotImplementedError" in test["output"]
               for test in told["tests"]) and len(told["tests"]) == len(tasks)
    assert assignment.grade(ROOT, tasks) == sum(task.points for task in tasks)
    (ROOT / "results.json").unlink()


@pytest.mark.parametrize("sheet", SHEETS)
def test_a_copy_holds_no_solution_and_still_explains_itself(copies, sheet):
    """No line of a solution is anywhere in the copy, but for idioms that other functions share;
    what was one is a docstring that says what."""
    folder, lines = copies / sheet, set()
    everything = "".join(path.read_text() for path in ROOT.glob("0*.py"))
    for task in assignment.tasks_of(sheet):
        text = (folder / task.file).read_text()
        node = next(node for node in ast.parse(text).body if getattr(node, "name", 0) == task.name)
        assert len(ast.get_docstring(node)) > 60 and len(node.body) == 2, task.name
        body = source_of(task.name).split('"""')[2]
        lines |= {line.strip() for line in body.splitlines()
                  if len(line.strip()) > 36 and everything.count(line.strip()) == 1}
    assert len(lines) > 2 * len(assignment.tasks_of(sheet))
    files = [path for path in folder.rglob("*") if path.suffix in (".py", ".md", ".ipynb")]
    assert len(files) > 10
    assert not {"tests", "notebooks", "course"} & {path.name for path in folder.iterdir()}
    assert [path.name for path in (folder / "sheets").iterdir()] == [f"{sheet}.md"]
    for path in files:
        text = path.read_text()
        assert not [line for line in lines if line in text], path
    run_process(folder / "01_flow_policy.py", "--help", cwd=folder)


@pytest.mark.parametrize("name", list(TASK))
def test_every_planted_mistake_is_called_by_its_name(name):
    module, tests, mistakes = assignment.watched(name)
    assert len(mistakes) >= 3
    for what, code, mistake in mistakes:
        wrong = assignment.known.mutate(module, name, code, mistake)[2]
        assert what in assignment.likely_errors(wrong, name), f"{what}: {code} -> {mistake}"
    assert not assignment.likely_errors(getattr(module, name), name)


@pytest.mark.parametrize("name", ["noise_scale", "mirror", "gae"])
def test_a_students_mistake_is_named_whatever_the_code_looks_like(name, tmp_path):
    """In the file, through the process of its own; and right code of another look is right."""
    written = {"noise_scale": '''
def noise_scale(times, noise_level):
    before, after = times[:-1], times[1:]
    lower = 1 - torch.where(before == 1, after, before)
    return noise_level * (before / lower)SQRT''', "mirror": '''
def mirror(v_theta, v_old, beta, max_drift):
    delta = v_theta - v_old
    length = delta.square().sum(-1, keepdim=True).sqrt()
    delta = torch.where(length > max_drift, delta * max_drift / length, delta)
    return v_old SIGN beta * delta, helper(v_old, beta * delta)

def helper(a, b):
    return a OTHER b''', "gae": '''
def gae(values, success, episode, gamma=0.99, lam=0.95):
    out = torch.zeros_like(values)
    for e in episode.unique():
        rows, last, after = (episode == e).nonzero()[:, 0].tolist(), 0.0, 0.0
        for i, row in enumerate(rows[::-1]):
            delta = float(success[e]) * (i == 0) + gamma * after - values[row]
            last, after = delta + gamma * LAM last, values[row]
            out[row] = last
    return out, out + values'''}[name]
    right = {"SQRT": " ** 0.5", "SIGN": "+", "OTHER": "-", "LAM": "lam *"}
    wrong = {"SQRT": "", "SIGN": "-", "OTHER": "+", "LAM": ""}
    for words, passes in ((right, True), (wrong, False)):
        text = re.sub("|".join(right), lambda word: words[word[0]], written)
        passed, told = graded(tmp_path, name, text)
        assert passed == passes, told
    assert {"noise_scale": "square root", "mirror": "swapped", "gae": "lambda"}[name] in told


def test_a_sheet_can_be_followed(copies):
    """Its one line that prints runs once `sliding_chunks` is there, its commands parse, and every
    question has an answer on the instructor's page."""
    answers = (ROOT / "course/answers.md").read_text().split("## The sheets")[1]
    for sheet in SHEETS:
        text = (copies / f"{sheet}/sheets/{sheet}.md").read_text()
        line, = re.findall(r'`\.venv/bin/python -c "(.*)"`', text)
        if sheet != "A":
            done = subprocess.run([sys.executable, "-c", line], cwd=copies / sheet, text=True,
                                  capture_output=True, check=True)
            steps = len(expert_demos(1, seed=0)[0][1])
            assert done.stdout == f"torch.Size([{steps}, 4, 2])\n"
        assert re.findall(rf"^\| {sheet} \| `(\w+)` \|", answers, re.M) == [
            task.name for task in assignment.tasks_of(sheet)]


def test_one_function_blocks_no_other_and_nothing_the_grader(copies, tmp_path, monkeypatch):
    (tmp_path / "03_step_loss.py").write_text(with_function(
        (copies / "B/03_step_loss.py").read_text(), "ema_decay", source_of("ema_decay")))
    tasks = assignment.tasks_of("B")
    assert assignment.grade(tmp_path, tasks) == TASK["ema_decay"].points
    monkeypatch.setattr(assignment, "SECONDS", 1)
    head = "def time_grid(num_steps):\n    "
    for body, said in (("while True: pass", "1 seconds"), ("import os; os._exit(0)", "ended"),
                       ("raise SystemExit", "SystemExit"),
                       ("return torch.zeros(2**31)", "RuntimeError"),
                       ("return (", "SyntaxError")):
        passed, told = graded(tmp_path, "time_grid", head + body)
        assert not passed and said in told, (body, told)


def test_the_command_makes_and_grades(tmp_path):
    made = run_script("course/assignment.py", "make", "copy", "--sheet", "B", "--workflow",
                      cwd=tmp_path)
    assert "functions=9" in made.stderr and "RESULT" not in made.stdout
    assert "--sheet B" in made.stdout
    done = run_script("course/assignment.py", "grade", "copy", "--sheet", "B", cwd=tmp_path,
                      ok=False)
    assert done.returncode == 1 and "points=0 of=21" in done.stdout
    assert "not empty" in wrong_call("course/assignment.py", "make", tmp_path / "copy")
    assert "01_flow_policy.py" in wrong_call("course/assignment.py", "grade", tmp_path)


def test_the_small_install_is_enough():
    """Without simulators and pretrained networks, which the instructor's page leaves out."""
    page = (ROOT / "course/README.md").read_text()
    install = re.search(r"`\.venv/bin/pip install ([\w ]+)`", page)[1].split()
    assert {"torch", "scipy", "gymnasium", "h5py", "pytest"} <= set(install)
    absent = ["mani_skill", "sapien", "mujoco", "robosuite", "libero", "transformers"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); " + "; ".join(
        f"import course.{name}" for name in ("assignment", "challenge", "exercises",
                                             "find_the_bug"))
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
