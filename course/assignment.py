"""The homework sheets: a student's copy of the repo, and its grade.

make writes a copy without course, notebooks, tests and results, in which the functions of a sheet
(course/sheets/*.md) are empty under their docstring, the spec. grade takes each of these functions
out of a student's file, alone, and tries it inside the reference: one that is missing blocks no
other. It is worth its points if it passes the tests that watch it in tests/test_mutants.py. If it
does not, but does what one of the mistakes planted there does, that mistake is named.

A student's code runs in a process of its own, with limits of time and memory. That keeps a loop
from blocking the grader; it is no defence against somebody who wants to cheat. The solutions are
public: use the sheets for practice, or ask for an explanation of a function.

Run:     python course/assignment.py make copies/B --sheet B
         python course/assignment.py grade copies/B --sheet B
Prints:  a line for each function and RESULT; the exit code is 0 with full marks.
Saves:   grade: FOLDER/results.json, in Gradescope's form. make --workflow > FILE: FILE, put into
         .github/workflows/ of the copy, lets GitHub Classroom grade each push.
"""

import ast
import contextlib
import copy
import functools
import importlib
import io
import json
import multiprocessing
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import test_mutants as known  # noqa: E402  (the line above tells where)
from tools import flags  # noqa: E402

LEFT_OUT = ("tests/", ".ci/", "results/", "notebooks/", "course/")  # solutions, answers
COPIED = "results/figures/"                     # though it is in one of these folders
SECONDS, GIGABYTES, CALLS = 20, 4, 6            # of each function; calls to compare mistakes by
Task = namedtuple("Task", "file name points")
WORKFLOW = """\
on: [push]
jobs:
  grade:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
        with: {path: student}
      - uses: actions/checkout@v4
        # of a private reference: a token in `with` as well, token: ${{ secrets.NAME }}
        with: {repository: YOUR/REFERENCE, path: reference}
      - run: pip install torch numpy scipy gymnasium h5py matplotlib tqdm pytest
      - run: python reference/course/assignment.py grade student --sheet SHEET
"""


def tasks_of(sheet):
    """The functions of a sheet, read off its table."""
    text = (ROOT / "course/sheets" / f"{sheet}.md").read_text()
    return [Task(file, name, int(points)) for file, name, points in re.findall(
        r"^\| (\d\d_\w+\.py) \| `(\w+)` \| (\d+) \|", text, re.M)]


def watched(name):
    """A function of a sheet -> (its module, the tests that watch it, the known mistakes)."""
    for (module, function, tests), mistakes in known.MUTANTS.items():
        if function == name:
            return module, tests, mistakes
    raise KeyError(f"test_mutants.py does not watch {name}")


# ------------------------------------------------------------------------------------------------
# The student's copy


def empty(source, names):
    """A file in which these functions have a docstring and no body."""
    lines = source.splitlines(keepends=True)
    found = [node for node in ast.parse(source).body if getattr(node, "name", None) in names]
    assert len(found) == len(names), f"{names} are not all there"
    for node in reversed(found):
        first = node.body[0]
        has_spec = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        begin = first.end_lineno if has_spec else first.lineno - 1
        # not a gap of this repo: the place where the student writes
        lines[begin:node.end_lineno] = ["    raise NotImplementedError\n"]
    return "".join(lines)


def make(folder, sheet):
    """Copies what git tracks; the functions of the sheet are empty in it."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, text=True,
                             capture_output=True).stdout.split()
    for name in tracked:
        if not name.startswith(LEFT_OUT) or name.startswith(COPIED):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "sheets").mkdir(exist_ok=True)
    text = (ROOT / f"course/sheets/{sheet}.md").read_text()
    # in the copy the scripts are one folder up, here two
    (folder / f"sheets/{sheet}.md").write_text(text.replace("](../../", "](../"))
    tasks = tasks_of(sheet)
    for file in {task.file for task in tasks}:
        names = [task.name for task in tasks if task.file == file]
        (folder / file).write_text(empty((ROOT / file).read_text(), names))
    return tasks


# ------------------------------------------------------------------------------------------------
# Grading


def students(path, module, name):
    """The function as the student wrote it, inside the reference module. What else the file
    defines or imports, and the reference does not, comes with it."""
    def names(node):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
        if isinstance(node, ast.Assign):
            return [part.id for target in node.targets for part in ast.walk(target)
                    if isinstance(part, ast.Name)]
        return [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []

    tree = ast.parse(path.read_text(), str(path))
    own = [node for node in tree.body if names(node) == [name]
           or names(node) and not any(hasattr(module, known) for known in names(node))]
    if [name] not in [names(node) for node in own]:
        raise AttributeError(f"{path.name} has no function {name}")
    exec(compile(ast.Module(own, []), str(path), "exec"), vars(module))
    return getattr(module, name)


def try_tests(tests):
    """-> the first test that fails and how, or None."""
    for test in tests:
        try:
            known.run(test)
        except BaseException as error:  # a student's code may raise anything
            label = getattr(test, "func", test).__name__.removeprefix("test_").replace("_", " ")
            return f"{label}: {type(error).__name__} {error}".split("\n")[0][:200]


def calls_in(tests, module, name):
    """Arguments with which the tests call the reference, and the random state then."""
    real = getattr(module, name)
    calls = []

    def watch(*args, **kwargs):
        with contextlib.suppress(Exception):  # what cannot be copied is no sample
            if len(calls) < CALLS:
                calls.append((copy.deepcopy((args, kwargs)), torch.get_rng_state()))
        return real(*args, **kwargs)

    setattr(module, name, watch)
    try_tests(tests)
    setattr(module, name, real)
    return calls


def flat(value, out, depth=4):
    """All numbers in a result, and in what a function may have changed, in one list; of a tensor
    the first 4096."""
    if torch.is_tensor(value):
        out += [str(tuple(value.shape)), value.detach().flatten()[:4096].double()]
        if value.is_leaf and value.grad is not None:
            flat(value.grad, out)
    elif isinstance(value, (int, float, str)):
        out.append(value if isinstance(value, str) else torch.tensor(float(value)).double())
    elif isinstance(value, (list, tuple)):
        for part in value:
            flat(part, out, depth)
    elif isinstance(value, dict):
        flat([value[key] for key in sorted(value, key=str)], out, depth)
    elif isinstance(value, torch.nn.Module):
        flat([*value.parameters(), *value.buffers()], out)
    elif hasattr(value, "tolist"):
        flat(torch.as_tensor(value), out)
    elif depth and hasattr(value, "__dict__"):  # a policy of a test, say, that counts its calls
        flat(vars(value), out, depth - 1)
    return out


def tensors(value):
    """Those in a result that a gradient can come from."""
    if torch.is_tensor(value):
        return [value] if value.requires_grad else []
    parts = value.values() if isinstance(value, dict) else value
    return sum(map(tensors, parts), []) if isinstance(value, (dict, list, tuple)) else []


def behaviour(function, calls):
    """What it gives and changes in each call, and its gradient; or the name of what it raises."""
    seen = []
    for arguments, state in calls:
        args, kwargs = copy.deepcopy(arguments)
        torch.set_rng_state(state)
        try:
            result = function(*args, **kwargs)
            found = tensors(result)
            if found:
                sum(value.sum() for value in found).backward()
            seen.append(flat([result, args, kwargs], []))
        except BaseException as error:
            seen.append([type(error).__name__])
    return seen


def alike(a, b):
    """Two behaviours, up to rounding."""
    def same(x, y):
        if torch.is_tensor(x) and torch.is_tensor(y):
            return torch.allclose(x, y, rtol=1e-5, atol=1e-5, equal_nan=True)
        return type(x) is type(y) and x == y
    return all(len(x) == len(y) and all(map(same, x, y)) for x, y in zip(a, b))


def failure(function, name):
    """How the tests fail with this function in the reference's place, or None."""
    module, tests, _ = watched(name)
    real = getattr(module, name)
    setattr(module, name, function)
    failed = try_tests(tests)
    setattr(module, name, real)
    return failed


@functools.cache
def known_behaviours(name):
    """Of a function in the reference: calls to try, what is right there, and what each mistake
    does; of one whose results are right, which is caught otherwise, how the tests fail."""
    module, tests, mistakes = watched(name)
    calls = calls_in(tests, module, name)
    right = behaviour(getattr(module, name), calls)
    wrong, silent = {}, {}
    for what, code, mistake in mistakes:
        function = known.mutate(module, name, code, mistake)[2]
        does = behaviour(function, calls)
        if alike(does, right):
            silent[what] = failure(function, name)
        else:
            wrong[what] = does
    return calls, right, wrong, silent


def likely_errors(function, name):
    """Names of the known mistakes that do the same as the student's function."""
    calls, right, wrong, silent = known_behaviours(name)
    seen = behaviour(function, calls)
    if not alike(seen, right):
        return [what for what, does in wrong.items() if alike(seen, does)]
    failed = failure(function, name) if silent else None
    return [what for what, how in silent.items() if failed and how == failed]


def trial(connection, path, name):
    """In a process of its own: one function of a student -> (passed, what to say)."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_DATA, (GIGABYTES << 30, GIGABYTES << 30))
    module, tests, _ = watched(name)
    real = getattr(module, name)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            function = students(path, module, name)
        except BaseException as error:
            return connection.send((False, f"{type(error).__name__} {error}"))
        failed = try_tests(tests)
        if failed and "NotImplementedError" not in failed:
            setattr(module, name, real)  # the calls to try are those that the reference gets
            errors = likely_errors(function, name)
            failed = " or ".join(errors) + f" ({failed})" if errors else failed
    connection.send((not failed, failed or "right"))


def grade_one(path, name):
    """-> (passed, what to say) of a function, within its limits."""
    context = multiprocessing.get_context("fork")  # what is imported here need not be again
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=trial, args=(its, path, name))
    process.start()
    its.close()
    answer = (False, f"no answer within {10 * SECONDS} seconds")
    if mine.poll(10 * SECONDS):  # the limit above is of its CPU: a busy machine fails nobody
        with contextlib.suppress(EOFError):
            answer = (False, f"its process ended: {SECONDS} seconds, {GIGABYTES} GB, or exit")
            answer = mine.recv()
    process.kill()
    process.join()
    return answer


def grade(folder, tasks):
    """A line for each function and Gradescope's results.json -> points."""
    # what torch imports late, when a test needs it: once, and not in each function's process
    for late in ("torch._dynamo", "torch.distributed.tensor"):
        importlib.import_module(late)
    tests = []
    for task in tasks:
        passed, told = grade_one(folder / task.file, task.name)
        score = task.points * passed
        tests.append({"name": f"{task.file} {task.name}", "score": score,
                      "max_score": task.points, "output": told})
        print(f"{task.name:<20} {score} of {task.points}  {told}", flush=True)
    score = sum(test["score"] for test in tests)
    (folder / "results.json").write_text(json.dumps({"score": score, "tests": tests}, indent=1))
    return score


def main():
    parser = flags.Parser(__doc__)
    parser.add_argument("what", choices=["make", "grade"], help="make a copy, or grade one")
    parser.add_argument("folder", type=Path, help="of the student's copy")
    sheets = sorted(path.stem for path in (ROOT / "course/sheets").glob("*.md"))
    parser.add_argument("--sheet", choices=sheets, default=sheets[0], help="which functions")
    parser.add_argument("--workflow", action="store_true",
                        help="make: print a workflow of GitHub Classroom for this sheet")
    args, start = parser.parse_args(), time.time()
    if args.what == "make":
        if args.folder.exists() and any(args.folder.iterdir()):
            parser.error(f"folder {args.folder} is not empty; give another one")
        parser.make_folder("folder", args.folder)
        tasks = make(args.folder, args.sheet)
        if args.workflow:
            print(WORKFLOW.replace("SHEET", args.sheet), end="")
        return print(f"RESULT functions={len(tasks)} read={args.folder}/sheets/{args.sheet}.md",
                     file=sys.stderr if args.workflow else sys.stdout)
    tasks = tasks_of(args.sheet)
    missing = [task.file for task in tasks if not (args.folder / task.file).exists()]
    if missing:
        parser.error(f"folder {args.folder} has no {missing[0]}; give the folder of a copy")
    torch.set_num_threads(1)
    points, most = grade(args.folder, tasks), sum(task.points for task in tasks)
    print(f"RESULT points={points} of={most} seconds={time.time() - start:.0f}")
    sys.exit(points < most)


if __name__ == "__main__":
    main()
