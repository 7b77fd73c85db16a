"""results/libero/run.py: its numbers against worked examples, its commands against 04's flags, and
that the page's tables are what the rows say. And filtered_bc.py beside it: only successes teach."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from conftest import ROOT, result_line, run_process, run_script, wrong_call
from policies import build_policy
from policies.small import RobotPolicy
from tools.log import log_row
from tools.run import save

SCRIPT = "results/libero/run.py"
protocol, filtered_bc, common = map(importlib.import_module, (
    "results.libero.run", "results.libero.filtered_bc", "results.common"))
flow, robot = filtered_bc.flow, filtered_bc.robot
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


def test_the_average_is_of_three_suites_over_seeds_and_over_tasks():
    """Worked by hand. Two suites of one task each, a third of two; two seeds; other rows beside."""
    rates = {("libero_object", "0"): [(0.8, 1.0), (0.6, 1.0)],
             ("libero_spatial", "3"): [(0.4, 0.4), (0.5, 0.8)],
             ("libero_goal", "1"): [(0.2, 0.6), (0.1, 0.3)],
             ("libero_goal", "8"): [(0.6, 0.5), (0.7, 0.9)]}
    rows = []
    for (suite, task), seeds in rates.items():
        for seed, pair in enumerate(seeds):
            for policy, success in zip(("SFT", "pi-StepNFT"), pair):
                row = {**row_of(str(seed), policy, task, success), "suite": suite, "tested": suite}
                rows += [row, {**row, "demos": "5", "success": "0"},
                         {**row, "method": "filtered-bc", "success": "0"},
                         {**row, "tested": f"{suite}_lan", "success": "0"},
                         {**row, "starts": "random placements", "success": "0"}]
    rows += [{**row, "suite": "libero_10", "tested": "libero_10", "success": "0"} for row in rows]
    seeds, tasks, each = protocol.average(rows)
    # seed 0: (.8 + .4 + .4) / 3 -> (1 + .4 + .55) / 3; seed 1: (.6 + .5 + .4) / 3 -> 2.4 / 3
    assert (seeds["over"], seeds["count"]) == ("seeds", 2)
    gains = [(1.95 - 1.6) / 3, (2.4 - 1.5) / 3]
    assert [seeds[name] for name in ("sft", "after", "gain")] == pytest.approx(
        [3.1 / 6, 4.35 / 6, np.mean(gains)], abs=1e-4)
    assert seeds["removed"] == pytest.approx((4.35 - 3.1) / (6 - 3.1), abs=1e-4)
    # t with one degree of freedom: 12.706 standard errors, which are half of the two's distance
    assert seeds["gain_high"] - seeds["gain"] == pytest.approx(
        12.706 * (gains[1] - gains[0]) / 2, abs=1e-3)
    # four tasks: gains .3, .15, .3, .05, standard deviation .12247, t with three degrees 3.182
    assert (tasks["over"], tasks["count"]) == ("tasks", 4)
    assert [tasks[name] for name in ("sft", "after", "gain")] == pytest.approx(
        [3.9 / 8, 5.5 / 8, 0.2], abs=1e-4)
    assert tasks["gain"] - tasks["gain_low"] == pytest.approx(3.182 * 0.12247 / 2, abs=1e-3)
    assert (each["over"], each["count"], each["fall"], each["rise"]) == ("task-seeds", 8, 1, 6)
    one_seed = [row for row in rows if row["seed"] == "0"]
    one_suite = [row for row in rows if row["suite"] != "libero_goal"]
    assert protocol.average(one_seed) == protocol.average(one_suite) == protocol.average([]) == []


def test_the_average_of_the_page_by_another_way():
    """protocol_average.csv from protocol.csv with plain loops and scipy, in points as the page and
    the front page tell it."""
    won = {}
    for row in common.read(ROOT / "results/libero/protocol.csv"):
        if (row["suite"] in ("libero_object", "libero_spatial", "libero_goal")
                and row["tested"] == row["suite"] and row["demos"] == "1"
                and row["method"] == "stepnft" and row["starts"] == "official initial states"):
            won[row["suite"], int(row["task"]), row["seed"], row["policy"]] = round(
                50 * float(row["success"]))
    tasks = sorted({key[:2] for key in won})
    of_suite = [[task for task in tasks if task[0] == suite] for suite in dict(tasks)]
    gains, ends = [], []
    for seed in "012":
        means = [[np.mean([won[*task, seed, policy] / 50 for task in own]) for own in of_suite]
                 for policy in ("SFT", "pi-StepNFT")]
        ends.append([np.mean(part) for part in means])
        gains.append(ends[-1][1] - ends[-1][0])
    over_tasks = [np.mean([(won[*task, seed, "pi-StepNFT"] - won[*task, seed, "SFT"]) / 50
                           for seed in "012"]) for task in tasks]
    differences = [won[*task, seed, "pi-StepNFT"] - won[*task, seed, "SFT"]
                   for task in tasks for seed in "012"]
    rows = common.read(ROOT / "results/libero/protocol_average.csv")
    assert [row["over"] for row in rows] == ["seeds", "tasks", "task-seeds"]
    for row, values in zip(rows, (gains, over_tasks)):
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert [float(row[name]) for name in ("gain", "gain_low", "gain_high")] == pytest.approx(
            [np.mean(values), interval.low, interval.high], abs=6e-5)
        assert int(row["count"]) == len(values)
    before, after = np.mean(ends, axis=0)
    assert [float(rows[0][name]) for name in ("sft", "after", "removed")] == pytest.approx(
        [before, after, (after - before) / (1 - before)], abs=6e-5)
    falls, rises = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    assert [rows[2][name] for name in ("count", "fall", "rise")] == [
        str(len(differences)), str(falls), str(rises)]
    page = (ROOT / "results/libero/README.md").read_text()
    assert f"Of {len(differences)} tasks and seeds {rises} end higher, {falls} lower" in page
    assert f"from {100 * before:.1f} to {100 * after:.1f} %" in page


def test_a_study_of_one_suite_or_of_the_baseline_alone_is_summed_up(tmp_path, capsys, monkeypatch):
    for method, after in protocol.AFTER.items():
        out = tmp_path / method
        out.mkdir()
        for policy, success in (("SFT", 0.5), (after, 0.75)):
            log_row(out / "protocol.csv", {**row_of("0", policy, "8", success),
                                               "method": method})
        monkeypatch.setattr(sys, "argv", [SCRIPT, "--summary", "--out", str(out)])
        protocol.main()
        told = capsys.readouterr().out
        assert "0.500  0.750    0.500" in told and "average" not in told


def test_a_summary_of_nothing_is_told_in_one_line(tmp_path):
    assert "--summary" in wrong_call(SCRIPT, "--summary", "--out", str(tmp_path))


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
    assert len({common.key(job) for job in jobs}) == len(jobs)
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
    out = ROOT / "results/libero"
    protocol.write(common.read(out / "protocol.csv"), tmp_path)
    for name in ("protocol_suites.csv", "protocol_tasks.csv", "protocol_average.csv"):
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

    def played(command, show):
        assert show                                       # hours: its user sees what it prints
        commands.append(command)
        out = Path(command.split("--out ")[1])
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.csv").touch()
        suite = "libero_object_lan" if "--eval-only" in command else "libero_object"
        log_row(out / "test.csv", {"policy": "SFT", "suite": suite, "task": 0, "starts":
                                       libero.OFFICIAL_STARTS, "episodes": 2, "success": 0.5})

    monkeypatch.setattr(common, "call", played)
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


def test_a_run_that_fails_is_named_in_one_line(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "command_of", lambda job: "notebooks/execute.py --nonsense")
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--suite", "libero_10", "--runs", str(tmp_path),
                                      "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="notebooks/execute.py --nonsense --out [^ ]*seed0$"):
        protocol.main()
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("flags, named", [
    ("--suite libero_90", "--suite libero_90"), ("--demos 0", "--demos"), ("--seed -1", "--seed"),
    ("--method ppo", "--method"), ("--suite libero_goal --demos 5", "--demos 5")])
def test_a_wrong_call_is_told_in_one_line(flags, named):
    assert named in wrong_call(SCRIPT, *flags.split())


def test_filtered_cloning_learns_from_successes_alone():
    """Rows of failures are not a number here: who reads them is lost. What is learned is flow
    matching on what the others played, as `train_sft` would do it."""
    torch.manual_seed(0)
    policy = RobotPolicy(1, 2, 3, width=16, depth=1)
    batch = {"state": torch.randn(8, 3), "episode": torch.arange(8) // 2,
             "x": torch.randn(8, 5, 1, 2), "mask": torch.ones(8, 1)}
    batch["won"] = torch.tensor([True, False, True, False])[batch["episode"]]
    lost = ~batch["won"]
    batch["x"][lost], batch["state"][lost] = torch.nan, torch.nan
    kept, x_0 = {"state": batch["state"][~lost]}, batch["x"][~lost, -1]

    def loss():
        torch.manual_seed(1)
        return np.mean([flow.flow_matching_loss(policy, kept, x_0).item() for _ in range(50)])

    before, optimizer = loss(), torch.optim.Adam(policy.parameters(), lr=1e-2)
    args = SimpleNamespace(epochs=40, minibatch=3, device="cpu")
    info = filtered_bc.update(policy, optimizer, batch, args)
    assert loss() < 0.8 * before and np.isfinite(info["grad_norm"])
    weights = [p.clone() for p in policy.parameters()]
    nothing = {**batch, "won": torch.zeros(8, dtype=torch.bool)}
    assert filtered_bc.update(policy, optimizer, nothing, args) == {"loss": 0.0, "grad_norm": 0.0}
    assert all(torch.equal(a, b) for a, b in zip(weights, policy.parameters()))


def test_its_help_is_its_own(tmp_path):
    done = run_script("results/libero/filtered_bc.py", "--help", cwd=tmp_path)
    assert "Filtered behaviour cloning" in done.stdout


@pytest.mark.sim
def test_filtered_cloning_runs_as_04_does(tmp_path):
    args = robot.parse_args(["--out", str(tmp_path)])
    policy = build_policy(robot.policy_config(args))
    policy.fit_normalisation({"state": torch.randn(9, args.state_dim)}, torch.rand(9, 1, 7))
    save(tmp_path / "clone.pt", policy, args)
    done = run_process("results/libero/filtered_bc.py", *(
        "--sft clone.pt --iterations 1 --episodes 8 --max-steps 4 --test-max-steps 4 --num-envs 1 "
        "--test-states 1 --test-episodes 1 --eval-episodes 1 --out run").split(), cwd=tmp_path)
    assert {"sft", "filtered_bc"} < result_line(done).keys()
    rows = common.read(tmp_path / "run/test.csv")
    assert [(row["policy"], row["starts"], row["episodes"]) for row in rows] == [
        (policy, starts, "1") for starts in (libero.OFFICIAL_STARTS, "random placements")
        for policy in ("SFT", "filtered BC")]
