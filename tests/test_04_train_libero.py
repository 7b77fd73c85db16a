"""04 as a whole: wrong flags, images, a worker that dies, a resumed run, perturbed suites."""

import csv
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, one_clear_line, result_line, run_script
from test_envs_libero import gl, recorded, soup  # noqa: F401 (fixtures)

libero = importlib.import_module("04_train_libero")


@pytest.mark.parametrize("flags, words", [
    (["--suite", "libero_objects"], ["--suite"]),
    (["--tasks", "10"], ["--tasks"]),
    (["--num-demos", "0"], ["--num-demos"]),
    (["--suite", "libero_10"], ["--tasks 0", "--suite"]),
    (["--eval-only", "nothing.pt"], ["--eval-only"]),
    (["--action-repeat", "0"], ["--action-repeat"]),
    (["--sft-steps", "0"], ["--sft-steps"]),
    (["--eval-suites", "libero_10"], ["--eval-suites libero_10"]),      # more things than it knows
    (["--expert-only", "--suite", "libero_10", "--tasks", "all"], ["no scripted expert"]),
])
def test_bad_input_gets_one_line_naming_the_flag(tmp_path, flags, words):
    line = one_clear_line(run_script("04_train_libero.py", *flags, "--out", "new", cwd=tmp_path,
                                     ok=False))
    assert all(word in line for word in words)
    assert not (tmp_path / "new").exists()


def test_rgb_from_recorded_demos_to_evaluation_and_film(recorded, tmp_path, gl):
    run = run_script("04_train_libero.py", *"--obs rgb --image-size 48 --sft-steps 5 --episodes 8 "
                     "--iterations 1 --max-steps 8 --eval-episodes 2 --eval-every 1 --num-envs 2 "
                     "--test-episodes 2 --video 2 --out new".split(), "--demos", str(recorded[0]),
                     cwd=tmp_path)
    assert set(result_line(run)) >= {"sft", "stepnft"}
    log, = csv.DictReader(open(tmp_path / "new/log.csv"))
    assert float(log["env_steps"]) == 64 and 0 < float(log["loss"]) < 2
    films = sorted((tmp_path / "new/videos").iterdir())
    assert [film.name.split("_")[0] for film in films] == ["task0"] * 2
    assert all(film.suffix == ".mp4" and film.stat().st_size > 1000 for film in films)


def children(pid):
    """Worker processes of a run, from /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            told, command = path.read_text(), (path.parent / "cmdline").read_text()
        except OSError:
            continue
        if told.rsplit(")", 1)[1].split()[1] == str(pid) and "spawn_main" in command:
            found.append(int(path.parent.name))
    return found


def test_a_dying_worker_a_resumed_run_and_perturbed_suites(recorded, tmp_path):
    """A worker is killed in the second iteration; --resume finishes it; the tables include _lan."""
    flags = ["--demos", str(recorded[0]), *"--sft-steps 5 --iterations 2 --episodes 160 "
             "--max-steps 8 --eval-every 1 --eval-episodes 2 --test-episodes 2 --num-envs 2 "
             "--out new --eval-suites _lan".split()]
    killed = subprocess.Popen([sys.executable, str(ROOT / "04_train_libero.py"), *flags],
                              cwd=tmp_path, text=True, stderr=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    while "validation, iteration 1" not in killed.stdout.readline():
        assert killed.poll() is None, killed.stderr.read()
    time.sleep(1)
    os.kill(children(killed.pid)[0], signal.SIGKILL)
    _, errors = killed.communicate(timeout=120)
    line = errors.strip().splitlines()[-1]
    assert killed.returncode == 1 and "--resume" in line
    assert "task 0 from placement 2000" in line and "(seed 2000" in line

    run = run_script("04_train_libero.py", *flags, "--resume", cwd=tmp_path)
    log = list(csv.DictReader(open(tmp_path / "new/log.csv")))
    assert [row["episodes"] for row in log] == ["160", "320"]
    rows = list(csv.DictReader(open(tmp_path / "new/test.csv")))
    assert {(row["policy"], row["suite"], row["episodes"]) for row in rows
            if row["starts"] == "official initial states"} == {
        (policy, suite, "50") for policy in ("SFT", "pi-StepNFT")
        for suite in ("libero_object", "libero_object_lan")}
    assert result_line(run)["suite"] == "libero_object"
