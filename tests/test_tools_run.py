"""tools/run.py: checkpoints that bring a run back, SFT, the random stream of an iteration, what is
counted and how results are told."""

import contextlib
import importlib
import io
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import conftest  # noqa: F401  (the way to the scripts)
from envs.gap_world import GapWorld, episode_seeds
from policies.small import RobotPolicy
from tools import ranks, run

flow = importlib.import_module("01_flow_policy")


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def vector(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# ------------------------------------------------------------------------------------------------
# Checkpoints


def saved(path, policy, **flags):
    run.save(path, policy, SimpleNamespace(flags={"script": "04", **flags}), note={"n": 7})


def test_a_checkpoint_holds_the_policy_its_config_and_the_flags():
    policy = RobotPolicy(1, 1, 1, width=8)
    with folder() as path:
        saved(path / "p.pt", policy, seed=3)
        content = torch.load(path / "p.pt", weights_only=True)     # nothing in it is a program
        assert [file.name for file in path.iterdir()] == ["p.pt"]
    assert set(content) == {"note", "flags", "config", "policy"}
    assert content["note"] == {"n": 7} and content["flags"] == {"script": "04", "seed": 3}
    assert content["config"] == policy.config
    assert all(torch.equal(content["policy"][name], p) for name, p in policy.state_dict().items())


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    policy = RobotPolicy(1, 1, 1, width=8)
    saved(tmp_path / "p.pt", policy, seed=1)

    def dies_halfway(content, file):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", dies_halfway)
    with pytest.raises((OSError, SystemExit)):
        saved(tmp_path / "p.pt", policy, seed=2)
    assert torch.load(tmp_path / "p.pt", weights_only=True)["flags"]["seed"] == 1


def test_only_rank_0_writes_a_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "rank_of", lambda: (1, 2))
    saved(tmp_path / "p.pt", RobotPolicy(1, 1, 1, width=8))
    assert not list(tmp_path.iterdir())


LOG = "iteration,loss\n1,0.7\n2,0.6\n3,0.5\n"


def made_parts():
    """Three networks and an optimiser that has made a step."""
    policy, old, critic = (RobotPolicy(1, 2, 3, width=8) for _ in range(3))
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    vector_loss = sum(p.pow(2).sum() for p in policy.parameters())
    vector_loss.backward()
    optimizer.step()
    return {"policy": policy, "old": old, "optimizer": optimizer, "critic": critic}


def test_a_run_that_is_resumed_gets_every_part_back_and_repeats_no_row():
    with folder() as path:
        parts, args = made_parts(), SimpleNamespace(out=path, flags={}, resume=False)
        run.save_last(args, parts, {"iteration": 2, "env_steps": 70})
        (path / "log.csv").write_text(LOG)
        other = made_parts()
        args = SimpleNamespace(resume=path / "last.pt", out=path, device="cpu", iterations=9)
        assert run.begin(args, other) == {"iteration": 2, "env_steps": 70}
        assert (path / "log.csv").read_text() == "iteration,loss\n1,0.7\n2,0.6\n"
        assert sorted(file.name for file in path.iterdir()) == ["last.pt", "log.csv"]
    for name in ("policy", "old", "critic"):
        assert torch.equal(vector(parts[name]), vector(other[name])), name
    assert not torch.equal(vector(other["old"]), vector(other["policy"]))
    one, two = (each["optimizer"].state_dict()["state"] for each in (parts, other))
    assert one.keys() == two.keys() and all(
        torch.equal(one[i]["exp_avg"], two[i]["exp_avg"]) for i in one)


def test_a_new_run_starts_at_zero_and_takes_away_the_log_of_one_that_never_saved():
    with folder() as path:
        for iterations, left in ((0, True), (3, False)):
            (path / "log.csv").write_text(LOG)
            args = SimpleNamespace(out=path, resume=False, iterations=iterations)
            parts = made_parts()
            before = vector(parts["policy"])
            assert run.begin(args, parts) == {"iteration": 0, "env_steps": 0}
            assert (path / "log.csv").exists() == left
            assert torch.equal(vector(parts["policy"]), before)


# ------------------------------------------------------------------------------------------------
# SFT


SFT = SimpleNamespace(seed=5, device="cpu", sft_steps=3, sft_lr=1e-2, sft_batch=4)


def two_demos():
    torch.manual_seed(9)
    rows = [{"state": torch.randn(n, 3), "tokens": torch.full((n, 4), n)} for n in (5, 7)]
    chunks = torch.rand(12, 2, 2)
    return [(each, torch.zeros(len(each["state"]), 2)) for each in rows], chunks


def cloned(rank=0, **changes):
    demos, chunks = two_demos()
    torch.manual_seed(1234)                             # whatever was drawn before does not matter
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as told:
        patch.setattr(run, "rank_of", lambda: (rank, 2))
        policy = run.sft(SimpleNamespace(**{**vars(SFT), **changes}),
                         lambda: flow.FlowPolicy(2, 2, 3, width=8), demos, chunks)
    return policy, told.getvalue()


def cloned_by_hand(rank=0):
    """The seed makes the network; seed + rank draws the minibatches."""
    demos, chunks = two_demos()
    torch.manual_seed(5)
    policy = flow.FlowPolicy(2, 2, 3, width=8)
    torch.manual_seed(5 + rank)
    obs = {name: torch.cat([demos[0][0][name], demos[1][0][name]]) for name in ("state", "tokens")}
    loss = flow.train_sft(policy, obs, chunks, 3, 1e-2, 4)
    return policy, loss


def test_sft_trains_on_all_rows_of_all_demos_with_the_seeds_network_and_draws():
    policy, told = cloned()
    wanted, loss = cloned_by_hand()
    assert torch.equal(vector(policy), vector(wanted))
    torch.testing.assert_close(policy.state_centre, wanted.state_centre)
    assert "2 demos, 12 chunks of 2 actions" in told and f"loss {loss:.3f}" in told
    assert all(p.grad is None for p in policy.parameters())       # they would cost memory


def test_a_rank_starts_from_the_same_network_and_draws_rows_of_its_own():
    assert torch.equal(vector(cloned(rank=1)[0]), vector(cloned_by_hand(rank=1)[0]))
    assert not torch.equal(vector(cloned(rank=1)[0]), vector(cloned()[0]))


def test_sft_that_diverges_is_one_line():
    with pytest.raises(SystemExit, match="^SFT: [^\\n]*--sft-lr$"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flow, "train_sft", lambda *z: math.nan)
            cloned()


# ------------------------------------------------------------------------------------------------
# An iteration


def test_an_iteration_has_a_random_stream_of_its_own_on_each_rank():
    """That of its first training seed, which hangs on run and iteration; ranks count from there."""
    streams = {}
    for seed in (0, 3):
        for iteration in (0, 1, 2):
            for rank in (0, 1):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(run, "rank_of", lambda: (rank, 2))
                    run.random_stream(seed, iteration)
                streams[seed, iteration, rank] = torch.rand(3).tolist()
                first = int(episode_seeds("train", 1, seed, iteration)[0])
                torch.manual_seed(first + rank)
                assert torch.rand(3).tolist() == streams[seed, iteration, rank]
    assert len({tuple(draws) for draws in streams.values()}) == 12


def test_an_iteration_is_counted_in_control_steps():
    """Actions that ran, of all ranks, each held for action_repeat steps."""
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    args, state = SimpleNamespace(action_repeat=4, episodes=16), {"iteration": 2, "env_steps": 100}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "gather", lambda values: torch.cat([values, values + 1]))
        row = run.count(args, state, np.array([True, False, False, False]), {"mask": mask})
    assert state == {"iteration": 3, "env_steps": 100 + 4 * (6 + 7)}
    assert row == {"iteration": 3, "episodes": 48, "env_steps": 152, "train_sde": 0.25}
    assert list(row) == ["iteration", "episodes", "env_steps", "train_sde"]


def test_an_iteration_without_a_success_is_told():
    args = SimpleNamespace(action_repeat=1, episodes=2)
    for success, words in (([False, False], "no episode succeeded"), ([True, False], "")):
        with contextlib.redirect_stdout(io.StringIO()) as told:
            run.count(args, {"iteration": 0, "env_steps": 0}, np.array(success),
                      {"mask": torch.ones(2, 1)})
        assert (words in told.getvalue()) and bool(told.getvalue()) == bool(words)


# ------------------------------------------------------------------------------------------------
# Tables and films


@pytest.mark.parametrize("k, n", [(0, 20), (7, 20), (20, 20), (431, 1000), (1, 1)])
def test_a_rate_has_wilsons_interval(k, n):
    z, p = 1.959964, k / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    row = run.rated(np.arange(n) < k)
    assert row["episodes"] == n and row["success"] == pytest.approx(p)
    assert row["low"] == pytest.approx(centre - half, abs=1e-5)
    assert row["high"] == pytest.approx(centre + half, abs=1e-5)


def test_a_report_is_a_line_with_the_interval_and_gives_the_rate(capsys):
    success = np.arange(20) < 7
    row = run.rated(success)
    assert run.report("test, SFT", success) == 0.35
    told, = capsys.readouterr().out.splitlines()
    assert told == (f"test, SFT: success 0.350 [{row['low']:.3f}, {row['high']:.3f}] over 20 "
                    "episodes")


def test_the_ood_mean_is_the_mean_of_the_axes_without_that_of_training(capsys):
    rates = {("in-distribution", "SFT"): [0.9], ("in-distribution", "ppo"): [1.0],
             ("vision", "SFT"): [0.1, 0.2, 0.6], ("vision", "ppo"): [0.4, 0.4, 0.4],
             ("execution", "SFT"): [0.5], ("execution", "ppo"): [0.8]}
    run.show_axes(rates)
    header, sft, ppo = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["in-distribution", "vision", "execution", "OOD", "mean"]
    assert sft == ["SFT", "0.900", "0.300", "0.500", "0.400"]
    assert ppo == ["ppo", "1.000", "0.400", "0.800", "0.600"]


def test_a_film_shows_the_first_episodes_of_a_policy_without_noise_and_closes_its_world():
    seen, seeds = [], episode_seeds("test", 5)

    class Filming(GapWorld):
        def play(self, act, own):
            seen.append((list(own), act(self.reset(own))))
            return super().play(act, own)

        def close(self):
            seen.append("closed")

    policy = flow.FlowPolicy(4, 2, 3, width=8)
    args = SimpleNamespace(video=3, device="cpu", num_steps=4, out="a/folder")
    with contextlib.redirect_stdout(io.StringIO()) as told:
        run.film(args, Filming(), policy, seeds)
    assert seen[-1] == "closed" and len(seen) == 2
    (played, (actions, recorded)), _ = seen
    assert played == seeds[:3].tolist() and recorded == {}
    world = GapWorld()
    torch.manual_seed(0)
    x_0 = flow.ode_sample(policy, world.reset(seeds[:3]), 4)
    torch.testing.assert_close(actions, policy.denormalise(x_0).detach())
    assert "saved 3 episodes in a/folder/videos" in told.getvalue()


def test_a_part_of_a_run_is_on_the_device_of_its_policy(monkeypatch):
    """A film is made on one rank: no other is waited for."""
    monkeypatch.setattr(ranks, "gather", None)
    world = GapWorld()
    world.close = lambda: None
    args = SimpleNamespace(video=2, device="cpu", num_steps=2, out="x")
    run.film(args, world, flow.FlowPolicy(4, 2, 3, width=8), episode_seeds("test", 2))
