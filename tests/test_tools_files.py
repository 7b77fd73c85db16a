"""Files are whole or not there, a folder is one run's, and what goes wrong is told in one line."""

import importlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT, run_main
from policies import load_policy
from policies.small import RobotPolicy
from tools import files, run

flow = importlib.import_module("01_flow_policy")
nft = importlib.import_module("03_step_loss")


def python(code, *args, **options):
    """A child that runs some code in the repo -> the process, its output in pipes."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


HOLD = """
import sys, time
from tools import files
print(files.lock(sys.argv[1]), flush=True)
sys.stdin.read()
"""


# ------------------------------------------------------------------------------------------------
# A folder is one run's


def test_a_folder_is_held_as_long_as_its_process_lives(tmp_path):
    holder = python(HOLD, tmp_path, stdin=subprocess.PIPE)
    assert holder.stdout.readline() == "True\n"
    second = python(HOLD, tmp_path, stdin=subprocess.DEVNULL)
    assert second.communicate()[0] == "False\n"
    holder.kill()                                              # no time to clean up
    holder.wait()
    third = python(HOLD, tmp_path, stdin=subprocess.DEVNULL)
    assert third.communicate()[0] == "True\n" and not list(tmp_path.iterdir())


def test_a_process_may_claim_its_folder_twice_and_other_ranks_do_not_ask(tmp_path, monkeypatch):
    assert files.lock(tmp_path) and files.lock(tmp_path)
    holder = python(HOLD, tmp_path, stdin=subprocess.DEVNULL,
                    env={**os.environ, "RANK": "1"})           # torchrun's second rank
    assert holder.communicate()[0] == "True\n"
    files.HELD.pop(tmp_path.resolve()).close()


@pytest.fixture(scope="module")
def holder(tmp_path_factory):
    """A folder that another process holds."""
    folder = tmp_path_factory.mktemp("held")
    process = python(HOLD, folder, stdin=subprocess.PIPE)
    process.stdout.readline()
    yield folder
    process.communicate()


@pytest.mark.parametrize("command", [
    "02_sde_sampler.py", "03_step_loss.py", "05_train_maniskill.py --task PixelGap"])
def test_a_second_run_in_the_same_folder_is_refused_in_one_line(command, holder):
    script, *flags = command.split()
    code, told, err = run_main(script, *flags, "--out", holder)
    line, = err.strip().splitlines()
    assert code == 2 and f"--out {holder}" in line and "another run" in line and told == ""


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_trained(tmp_path, monkeypatch):
    """01's clone is trained where 02 and 03 are called: /proc takes no folder."""
    monkeypatch.chdir("/proc")
    for script in ("02_sde_sampler.py", "03_step_loss.py"):
        told, out, err = run_main(script, "--out", tmp_path / script)
        assert "runs/01_flow_policy" in told and "another folder" in told
        assert "\n" not in told and out == err == ""


# ------------------------------------------------------------------------------------------------
# Whole files


def test_a_file_that_does_not_fit_leaves_the_old_one_whole(tmp_path):
    path = tmp_path / "last.pt"
    files.save({"x": torch.zeros(3)}, path)
    code = """
import resource, signal, sys, torch
from tools import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))      # as a disk that is full
files.save({"x": torch.zeros(100_000)}, sys.argv[1])
"""
    child = python(code, path)
    _, told = child.communicate()
    assert child.returncode and len(told.strip().splitlines()) == 1, told
    assert "could not be written" in told and str(path) in told
    assert torch.equal(files.load(path)["x"], torch.zeros(3))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half of a checkpoint", b"text"])
def test_a_broken_clone_is_named_in_one_line(content, tmp_path):
    path = tmp_path / "sft_demos6_steps3000_seed0.pt"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match="broken.*delete it"):
        flow.toy_policy(0, folder=tmp_path)


def test_a_half_written_clone_is_named_in_one_line(tmp_path):
    path = tmp_path / "sft_demos6_steps3000_seed0.pt"
    files.save(flow.FlowPolicy(4, 2, 3).state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(SystemExit, match="broken.*delete it"):
        flow.toy_policy(0, folder=tmp_path)


def test_only_rank_0_writes_a_checkpoint(tmp_path, monkeypatch):
    policy, args = RobotPolicy(1, 2, 3, width=8), type("args", (), {"flags": {}})
    for rank in (1, 0):
        monkeypatch.setattr(run, "rank_of", lambda: (rank, 2))
        run.save(tmp_path / "sft.pt", policy, args)
        assert (tmp_path / "sft.pt").exists() == (rank == 0)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_torchs_wrappers_are_no_part_of_a_name(prefix, tmp_path):
    policy = RobotPolicy(1, 2, 3, width=8)
    weights = {prefix + name: value for name, value in policy.state_dict().items()}
    files.save({"config": policy.config, "policy": weights}, tmp_path / "last.pt")
    loaded = load_policy(tmp_path / "last.pt")
    for p, q in zip(policy.parameters(), loaded.parameters()):
        assert torch.equal(p, q)


def test_weights_of_another_network_are_told_in_one_line(tmp_path):
    content = {"config": RobotPolicy(1, 2, 3, width=8).config,
               "policy": RobotPolicy(1, 2, 3, width=16).state_dict()}
    files.save(content, tmp_path / "last.pt")
    with pytest.raises(SystemExit, match="not those of its config") as stopped:
        load_policy(tmp_path / "last.pt")
    assert "\n" not in str(stopped.value)


# ------------------------------------------------------------------------------------------------
# No number any more


def test_a_gradient_that_is_no_number_changes_nothing():
    layer = torch.nn.Linear(1, 1)
    before, optimizer = layer.weight.item(), torch.optim.SGD(layer.parameters(), lr=1.0)
    for value in ("nan", "inf"):
        with pytest.raises(SystemExit, match="lower --lr"):
            nft.optimise(layer, optimizer, layer.weight.sum() * float(value), grad_clip=1.0)
    assert layer.weight.item() == before


PIXEL = ("--task", "PixelGap", "--num-demos", 2, "--sft-steps", 5, "--episodes", 16,
         "--eval-episodes", 8, "--test-episodes", 8)


def test_a_run_that_diverges_stops_and_keeps_its_last_finite_policy(tmp_path):
    told, out, _ = run_main("05_train_maniskill.py", *PIXEL, "--lr", 1e9, "--iterations", 9,
                            "--out", tmp_path / "out")
    assert "lower --lr" in told and "\n" not in told and "RESULT" not in out
    if (tmp_path / "out/last.pt").exists():
        policy = load_policy(tmp_path / "out/last.pt")
        assert all(p.isfinite().all() for p in policy.parameters())


def test_an_sft_that_diverges_is_told_before_it_is_saved(tmp_path):
    told, *_ = run_main("05_train_maniskill.py", *PIXEL, "--sft-lr", 1e30, "--out",
                        tmp_path / "out")
    assert "lower --sft-lr" in told and "\n" not in told
    assert not (tmp_path / "out/sft.pt").exists()


def test_a_finished_run_that_is_resumed_for_less_tells_what_was_played(tmp_path):
    out = tmp_path / "out"
    run_main("05_train_maniskill.py", *PIXEL, "--iterations", 3, "--out", out)
    _, told, _ = run_main("05_train_maniskill.py", "--task", "PixelGap", "--resume",
                          "--iterations", 1, "--out", out)
    assert " episodes=48 " in told.splitlines()[-1]


# ------------------------------------------------------------------------------------------------
# The system says no


def test_ctrl_c_ends_a_run_in_one_line(workplace):
    child = subprocess.Popen([sys.executable, ROOT / "03_step_loss.py", "--out", workplace / "out"],
                             cwd=workplace, text=True, stderr=subprocess.PIPE,
                             stdout=subprocess.DEVNULL, start_new_session=True)
    log, began = workplace / "out/log.csv", time.time()
    while not log.exists() and time.time() - began < 120:
        time.sleep(0.2)
    os.killpg(child.pid, signal.SIGINT)                        # as a terminal does, to all of them
    _, told = child.communicate(timeout=60)
    assert child.returncode == 130 and told.strip().splitlines() == [
        "stopped; a run that has saved last.pt goes on with --resume"]


MANY = """
import resource, sys
from tools import flags
from envs import my_world, workers
def main():
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    workers.Workers(my_world.make_env, 30)
if __name__ == "__main__":
    flags.call(main)
"""


def test_more_simulators_than_files_are_told_in_one_line(tmp_path):
    (tmp_path / "many.py").write_text(MANY)
    done = subprocess.run([sys.executable, tmp_path / "many.py"], text=True, capture_output=True,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    lines = [line for line in done.stderr.strip().splitlines() if line]
    assert done.returncode and len(lines) == 1, done.stderr
    assert "--num-envs 30" in lines[0] and "ulimit" in lines[0]
