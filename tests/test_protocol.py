"""results/protocol.py: its numbers against worked examples, its commands against 04's flags, and
that the page's table is what the rows say. results/filtered_bc.py: only successes teach."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ROOT, result_line, run_script, wrong_call

sys.path.insert(0, str(ROOT / "results"))
protocol, filtered_bc, study = map(importlib.import_module, ("protocol", "filtered_bc", "study"))
flow, nft, robot = filtered_bc.flow, filtered_bc.nft, filtered_bc.robot
libero = protocol.libero


def row_of(seed, policy, task, success, episodes=50, starts=libero.OFFICIAL_STARTS):
    return {"suite": "libero_goal", "seed": seed, "demos": "1", "method": "stepnft",
            "tested": "libero_goal", "starts": starts, "task": task, "policy": policy,
            "episodes": str(episodes), "success": str(success)}


def test_the_share_of_failures_removed_is_of_each_seed_and_then_averaged():
    """Seed 0: .5 -> .9 removes .8 of the failures, seed 1: .8 -> .9 half of them."""
    rows = [row_of("0", "SFT", "1", 0.4), row_of("0", "SFT", "2", 0.6),
            row_of("0", "pi-StepNFT", "1", 0.8), row_of("0", "pi-StepNFT", "2", 1.0),
            row_of("1", "SFT", "1", 0.8), row_of("1", "pi-StepNFT", "1", 0.9),
            row_of("1", "SFT", "1", 0.0, starts="random placements")]
    found, = protocol.summarise(rows)
    assert (found["seeds"], found["tasks"]) == (2, 2)
    assert [found[name] for name in ("sft", "after", "gain", "removed")] == pytest.approx(
        [0.65, 0.9, 0.25, 0.65])
    # t with one degree of freedom: 12.706 standard errors, here of .4 and .1: .15
    assert found["gain_high"] - found["gain"] == pytest.approx(12.706 * 0.15, abs=1e-3)
    alone, = protocol.summarise(rows[:4])
    assert alone["removed"] == pytest.approx(0.8) and np.isnan(alone["removed_low"])


def test_the_average_takes_each_suite_once_from_its_fewest_demonstrations():
    """.5 and .9 before, .9 and 1 after: .7 -> .95, five sixths of the failures. Three tasks of the
    first for each of the second: .6 -> .925, thirteen sixteenths."""
    suites = [{"suite": suite, "tested": tested, "demos": demos, "method": method, "tasks": tasks,
               "sft": before, "after": after}
              for suite, tested, demos, method, tasks, before, after in (
                  ("one", "one", "1", "stepnft", 6, 0.5, 0.9),
                  ("one", "one", "2", "stepnft", 6, 0.8, 1.0),
                  ("two", "two", "5", "stepnft", 2, 0.9, 1.0),
                  ("one", "one_lan", "1", "stepnft", 6, 0.1, 0.2),
                  ("two", "two", "1", "filtered-bc", 2, 0.1, 0.2))]
    for found, name, means in zip(protocol.average(suites), ("average", "average of tasks"), (
            (0.7, 0.95, 0.25, 5 / 6), (0.6, 0.925, 0.325, 13 / 16)), strict=True):
        assert (found["tested"], found["tasks"], found["suite"]) == (name, 8, "")
        assert [found[column] for column in ("sft", "after", "gain", "removed")] == pytest.approx(
            means, abs=1e-4)
    assert protocol.average(suites[:2]) == protocol.average([]) == []


def test_a_study_of_one_suite_or_of_the_baseline_alone_is_summed_up(tmp_path, capsys, monkeypatch):
    for method, after in protocol.AFTER.items():
        out = tmp_path / method
        out.mkdir()
        for policy, success in (("SFT", 0.5), (after, 0.75)):
            nft.log_row(out / "protocol.csv", {**row_of("0", policy, "8", success),
                                               "method": method})
        monkeypatch.setattr(sys, "argv", ["protocol.py", "--summary", "--out", str(out)])
        protocol.main()
        told = capsys.readouterr().out
        assert "0.500  0.750    0.500" in told and "average" not in told


def test_a_summary_of_nothing_is_told_in_one_line(tmp_path):
    assert "--summary" in wrong_call("protocol.py", "--summary", "--out", str(tmp_path))


def test_tasks_count_by_their_episodes():
    rows = [row_of("0", "SFT", "1", 0.0, 10), row_of("0", "SFT", "2", 1.0, 30)]
    assert protocol.rate(rows, "SFT") == pytest.approx(0.75)


def test_every_run_has_the_same_flags_and_they_are_those_of_04(tmp_path):
    """Defaults but for 16 iterations, a validation after every fourth, and the baseline's lr."""
    def flags_of(args):
        return {name: value for name, value in args.flags.items()
                if name not in ("suite", "seed", "num_demos", "tasks", "lr")}

    jobs, out = protocol.all_jobs(), ["--out", str(tmp_path / "out")]
    default = robot.parse_args(out)
    expected = {**flags_of(default), "iterations": 16, "eval_every": 4}
    lr = {"stepnft": default.lr, "filtered-bc": 1e-4}
    assert len({study.key(job) for job in jobs}) == len(jobs)
    for suite in ("libero_object", "libero_spatial", "libero_goal"):
        assert {job["seed"] for job in jobs if job == {**job, "suite": suite, "demos": 1,
                                                       "method": "stepnft"}} == {0, 1, 2}
    for job in jobs:
        script, *flags = protocol.command_of(job).split()
        assert (ROOT / script).exists()
        args = robot.parse_args([*flags, *out])
        assert (args.suite, args.seed, args.num_demos) == (job["suite"], job["seed"], job["demos"])
        assert set(map(str, args.tasks)) == set(protocol.tasks_of(job["suite"])) != set()
        assert flags_of(args) == expected
        assert args.lr == lr[job["method"]]


def test_the_tables_of_the_page_are_what_the_rows_say(tmp_path):
    out = ROOT / "results/04_train_libero"
    protocol.write(study.read(out / "protocol.csv"), tmp_path)
    for name in ("protocol_suites.csv", "protocol_tasks.csv"):
        assert (tmp_path / name).read_text() == (out / name).read_text()


def test_a_tasks_row_has_every_seed_in_order():
    rows = [row_of(seed, policy, "8", rate) for seed, policy, rate in (
        ("10", "SFT", 0.3), ("2", "SFT", 0.5), ("2", "pi-StepNFT", 0.75), ("10", "pi-StepNFT", 1))]
    row, = protocol.task_rows([*rows, {**rows[0], "demos": "2"}, {**rows[0], "tested": "other"},
                               {**rows[0], "starts": "random placements"}])
    assert row == {"suite": "libero_goal", "task": "8", "instruction": "put the bowl on the plate",
                   "seeds": 2, "sft": 0.4, "sft_each": "0.50, 0.30",
                   "after": 0.875, "after_each": "0.75, 1.00"}


def test_a_test_out_of_distribution_leaves_that_of_the_run_alone(monkeypatch, tmp_path):
    """04 is played by a function. A run that was cut goes on; rows of a test that was cut go."""
    commands, job = [], protocol.all_jobs()[0]

    def played(command):
        commands.append(command)
        out = Path(command.split("--out ")[1])
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.csv").touch()
        suite = "libero_object_lan" if "--eval-only" in command else "libero_object"
        nft.log_row(out / "test.csv", {"policy": "SFT", "suite": suite, "task": 0, "starts":
                                       libero.OFFICIAL_STARTS, "episodes": 2, "success": 0.5})

    monkeypatch.setattr(protocol, "call", played)
    folder = tmp_path / protocol.name_of(job)
    rows = protocol.run(job, tmp_path, tmp_path / "curves")
    own = (folder / "test.csv").read_text()
    assert [(row["tested"], row["policy"]) for row in rows] == [
        ("libero_object", "SFT"), ("libero_object_lan", "SFT"), ("libero_object_lan", "pi-StepNFT")]
    assert "libero_object_lan" not in own and "--resume" not in commands[0]
    (folder / "last.pt").touch()
    (folder / "test.csv").unlink()                        # 04 writes it anew
    assert protocol.run(job, tmp_path, tmp_path / "curves") == rows
    assert commands[3] == f"04_train_libero.py --resume --out {folder}"
    assert (folder / "test.csv").read_text() == own


def test_a_run_that_fails_is_named_in_one_line(capfd):
    with pytest.raises(SystemExit, match="01_flow_policy.py --nonsense$"):
        protocol.call("01_flow_policy.py --nonsense")


@pytest.mark.parametrize("flags, named", [
    ("--suite libero_90", "--suite libero_90"), ("--demos 0", "--demos"), ("--seed -1", "--seed"),
    ("--method ppo", "--method"), ("--suite libero_goal --demos 5", "--demos 5")])
def test_a_wrong_call_is_told_in_one_line(flags, named):
    assert named in wrong_call("protocol.py", *flags.split())


def test_filtered_cloning_learns_from_successes_alone():
    """Rows of failures are not a number here: who reads them is lost. What is learned is flow
    matching on what the others played, as `train_sft` would do it."""
    torch.manual_seed(0)
    policy = robot.RobotPolicy(1, 2, 3, width=16, depth=1)
    batch = {"state": torch.randn(8, 3), "episode": torch.arange(8) // 2,
             "x": torch.randn(8, 5, 1, 2), "mask": torch.ones(8, 1)}
    success = np.array([True, False, True, False])
    lost = ~torch.as_tensor(success)[batch["episode"]]
    batch["x"][lost], batch["state"][lost] = torch.nan, torch.nan
    kept, x_0 = {"state": batch["state"][~lost]}, batch["x"][~lost, -1]

    def loss():
        torch.manual_seed(1)
        return np.mean([flow.flow_matching_loss(policy, kept, x_0).item() for _ in range(50)])

    before, optimizer = loss(), torch.optim.Adam(policy.parameters(), lr=1e-2)
    method = filtered_bc.FilteredBC(SimpleNamespace(epochs=40, minibatch=3))
    info = method.learn(policy, optimizer, batch, success)
    assert loss() < 0.8 * before and np.isfinite(info["grad_norm"])
    weights = [p.clone() for p in policy.parameters()]
    method.learn(policy, optimizer, batch, np.zeros(4, bool))        # nothing to learn from
    assert all(torch.equal(a, b) for a, b in zip(weights, policy.parameters()))


def test_its_help_is_its_own(tmp_path):
    done = run_script("results/filtered_bc.py", "--help", cwd=tmp_path)
    assert "Filtered behaviour cloning" in done.stdout


@pytest.mark.sim
def test_filtered_cloning_runs_as_04_does(tmp_path):
    args = robot.parse_args(["--out", str(tmp_path)])
    policy = robot.make_policy(args)
    policy.fit_normalisation({"state": torch.randn(9, args.state_dim)}, torch.rand(9, 1, 7))
    robot.save(tmp_path / "clone.pt", policy, args)
    done = run_script("results/filtered_bc.py", *(
        "--sft clone.pt --iterations 1 --episodes 8 --max-steps 4 --test-max-steps 4 --num-envs 1 "
        "--test-states 1 --test-episodes 1 --eval-episodes 1 --out run").split(), cwd=tmp_path)
    assert {"sft", "filtered_bc"} < result_line(done).keys()
    rows = study.read(tmp_path / "run/test.csv")
    assert [(row["policy"], row["starts"], row["episodes"]) for row in rows] == [
        (policy, starts, "1") for starts in (libero.OFFICIAL_STARTS, "random placements")
        for policy in ("SFT", "filtered BC")]
