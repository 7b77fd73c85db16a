"""04: the robot's policy, checkpoints, demonstrations, flags and ranks, most of it on the toy world
in a robot's clothes; then whole runs on the real simulator."""

import copy
import csv
import functools
import importlib
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from conftest import ROOT, one_clear_line, run_main, run_script, wrong_call
from envs import libero, workers
from test_envs_libero import gl, recorded, soup  # noqa: F401 (fixtures)

robot = importlib.import_module("04_train_libero")
flow, nft = robot.flow, robot.nft
SCRIPT, sim = "04_train_libero.py", pytest.mark.sim

# ------------------------------------------------------------------------------------------------
# The policy: state, images, a sentence, and slots that the sentence may name

SENTENCES = ["pick up the milk", "pick up the butter", "open the drawer"]


def told(sentences):
    return torch.tensor(np.stack([workers.tokens(sentence) for sentence in sentences]))


def full_policy():
    return robot.RobotPolicy(4, 3, state_dim=5 + 9, cameras=2, language=True, slots=3,
                             width=32)


def full_obs(sentences=SENTENCES):
    B = len(sentences)
    return {"state": torch.randn(B, 14), "tokens": told(sentences),
            "rgb": torch.randint(0, 256, (B, 2, 3, 64, 64), dtype=torch.uint8)}


def test_state_images_sentence_and_slots_make_one_context():
    policy, obs = full_policy(), full_obs()
    ctx = policy.encode(obs)
    # two numbers for 64 maps of each camera, 64 for the sentence, three for each of four glances
    assert ctx.shape == (3, 5 + 2 * 2 * 64 + 64 + 4 * 3) == (3, policy.context_dim)
    v = policy.velocity(torch.randn(3, 4, 3), torch.rand(3), ctx)
    assert v.shape == (3, 4, 3) and v.isfinite().all()


@pytest.mark.parametrize("senses, size", [
    ({}, 14), ({"cameras": 1}, 14 + 128), ({"language": True}, 14 + 64),
    ({"language": True, "slots": 2}, 8 + 64 + 12)])
def test_what_a_policy_does_not_have_it_does_not_need(senses, size):
    policy, obs = robot.RobotPolicy(4, 3, 14, **senses), {"state": torch.randn(3, 14)}
    if "cameras" in senses:
        obs["rgb"] = full_obs()["rgb"][:, :1]
    if "language" in senses:
        obs["tokens"] = told(SENTENCES)
    assert policy.encode(obs).shape == (3, size) == (3, policy.context_dim)
    assert flow.ode_sample(policy, obs, 2).shape == (3, 4, 3)


@pytest.mark.parametrize("change", ["state", "rgb", "tokens"])
def test_each_kind_of_observation_changes_the_velocity(change):
    policy, a, b = full_policy(), full_obs(SENTENCES[:1]), full_obs(SENTENCES[1:2])
    x_t, t = torch.randn(1, 4, 3), torch.rand(1)
    v = policy.velocity(x_t, t, policy.encode(a))
    v_changed = policy.velocity(x_t, t, policy.encode({**a, change: b[change]}))
    assert (v - v_changed).abs().max() > 1e-6  # an untrained net looks nowhere in particular


def test_the_two_cameras_are_told_apart():
    policy, obs = full_policy(), full_obs(SENTENCES[:1])
    swapped = {**obs, "rgb": obs["rgb"].flip(1)}
    assert (policy.encode(obs) - policy.encode(swapped)).abs().max() > 1e-4


def test_an_image_is_scaled_before_it_is_seen():
    """Dark and bright images keep the convolutions' inputs of order one, so maps stay apart."""
    policy, seen = full_policy(), []
    policy.image_encoder[0].register_forward_hook(
        lambda layer, inputs, output: seen.append(inputs[0]))
    obs = full_obs(SENTENCES[:2])
    obs["rgb"] = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1, 1).expand(2, 2, 3, 64,
                                                                                      64)
    policy.encode(obs)
    wanted = torch.tensor([-0.5, -0.5, 0.5, 0.5])
    torch.testing.assert_close(seen[0].flatten(1).mean(1), wanted)


def test_a_feature_is_the_mean_position_of_its_map():
    maps = torch.randn(2, 3, 4, 6)
    points = robot.spatial_softmax(maps)
    assert points.shape == (2, 6)
    for image in range(2):
        for channel in range(3):
            total = x = y = 0.0
            for row in range(4):
                for column in range(6):
                    weight = maps[image, channel, row, column].exp().item()
                    total += weight
                    x += weight * (2 * column / 5 - 1)
                    y += weight * (2 * row / 3 - 1)
            assert points[image, channel].item() == pytest.approx(x / total, abs=1e-5)
            assert points[image, 3 + channel].item() == pytest.approx(y / total, abs=1e-5)


def test_encoding_a_batch_is_encoding_one_by_one():
    policy, obs = full_policy(), full_obs([*SENTENCES, SENTENCES[0]])
    alone = [policy.encode(flow.take(obs, torch.tensor([i]))) for i in range(4)]
    torch.testing.assert_close(policy.encode(obs), torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sentence", ["fetch Großmutters 茶", "", "word " * 100])
def test_unseen_words_are_no_error(sentence):
    policy = robot.RobotPolicy(1, 1, 1, language=True)
    ctx = policy.encode({"state": torch.zeros(2, 1), "tokens": told([sentence, SENTENCES[0]])})
    assert ctx.isfinite().all() and (ctx[0] - ctx[1]).abs().max() > 1e-4


def test_different_sentences_differ_and_capitals_do_not():
    policy = robot.RobotPolicy(1, 1, 1, language=True)
    ctx = policy.encode({"state": torch.zeros(4, 1), "tokens": told([*SENTENCES,
                                                                     "Pick up the MILK"])})
    assert all((ctx[i] - ctx[j]).abs().max() > 1e-4 for i in range(3) for j in range(i))
    torch.testing.assert_close(ctx[3], ctx[0])


def test_the_sentence_alone_decides_which_slots_are_looked_at():
    """Shift one slot: the glances move by ten times their weight on it, whatever the rest is."""
    policy = robot.RobotPolicy(2, 2, state_dim=5 + 9, language=True, slots=3, width=16)
    policy.attention.weight.data *= 30
    weights = {}
    for i, sentence in enumerate(SENTENCES[:2]):
        for slot in range(3):
            state = torch.randn(1, 14)
            other = state.clone()
            other[:, 5 + 3 * slot:8 + 3 * slot] += 1
            a, b = (policy.encode({"state": z, "tokens": told([sentence])})[0]
                    for z in (state, other))
            assert torch.equal(a[:5 + 64], b[:5 + 64])
            moved = (b - a)[-12:].view(4, 3)
            torch.testing.assert_close(moved, moved[:, :1].expand(4, 3), rtol=1e-3, atol=1e-3)
            again = policy.encode({"state": torch.zeros(2, 14).index_fill_(
                1, torch.arange(5 + 3 * slot, 8 + 3 * slot), 1.0), "tokens": told([sentence] * 2)})
            torch.testing.assert_close(again[:, -12:].view(2, 4, 3)[0], moved, rtol=1e-3,
                                       atol=1e-3)
            weights[i, slot] = moved[:, 0] / 10
        total = sum(weights[i, slot] for slot in range(3))
        torch.testing.assert_close(total, torch.ones(4), rtol=1e-3, atol=1e-3)
    assert max((weights[0, slot] - weights[1, slot]).abs().max() for slot in range(3)) > 0.1


# ------------------------------------------------------------------------------------------------
# Action dims that hardly move in the demonstrations


def test_dims_that_hardly_move_in_the_demos_earn_no_credit():
    """A dim whose 1 and 99 % quantiles are less than 0.2 apart keeps v_old, without a gradient."""
    policy = robot.RobotPolicy(4, 5, state_dim=2)
    chunks = torch.rand(50, 4, 5) * 2 - 1
    chunks[..., 1], chunks[..., 4] = -1, 0.3 + 0.01 * torch.randn(50, 4)   # one rests, one trembles
    chunks[0, 0, 1] = 1                                   # one outlier in 200 is no movement
    policy.fit_normalisation({"state": torch.randn(50, 2)}, chunks)
    v_theta, v_old = torch.randn(2, 3, 4, 5)
    v_theta.requires_grad_()
    credited = robot.credited(policy, v_theta, v_old)
    credited.sum().backward()
    for dim in range(5):
        values = sorted(chunks[..., dim].flatten().tolist())
        moves = values[round(0.99 * 199)] - values[round(0.01 * 199)] > 0.2
        assert torch.equal(credited[..., dim], (v_theta if moves else v_old)[..., dim])
        assert v_theta.grad[..., dim].unique().tolist() == [float(moves)]
        assert moves == (dim in (0, 2, 3))


def test_an_update_of_the_method_leaves_uncredited_noise_out_of_the_loss():
    """Other v_old and x_next in a dim that never moved: the same loss, the same update."""
    torch.manual_seed(1)
    start = robot.RobotPolicy(2, 3, state_dim=2, width=16)
    start.action_scale.copy_(torch.tensor([1.0, 0.01, 1.0]))
    obs = {"state": torch.randn(16, 2)}
    _, path = robot.nft.sde.sde_sample(start, obs, 4, 0.3)
    batch = {**obs, **path._asdict(), "episode": torch.arange(16),
             "mask": torch.ones(16, 2, dtype=bool)}
    results = []
    for shift in (0, 1):
        policy = copy.deepcopy(start)
        changed = {**batch, "v": batch["v"] + shift * torch.tensor([0, 0.3, 0])}
        args = SimpleNamespace(num_steps=4, group_size=1, transitions="all", epochs=1, minibatch=16,
                               target="next", beta=1.0, max_drift=0.5, dpo_beta=1.0)
        info = robot.StepNFT(args).learn(policy, torch.optim.SGD(policy.parameters(), lr=0.1),
                                         changed, np.arange(16) % 2 == 0)
        weights = torch.cat([p.detach().flatten() for p in policy.parameters()])
        results.append((weights, info["margin"]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-6)


# ------------------------------------------------------------------------------------------------
# The toy world of 01 in a robot's clothes: whole runs of 04 and 05 without a simulator


class Toy(gap_world.GapWorld):
    """GapWorld with a robot's observations and actions. The first two action dims drive, the others
    stay near where the demos had them."""

    still, played = 0.3, []

    def __init__(self, state_dim, action_dim, demo_noise=None):
        super().__init__()
        self.state_dim, self.action_dim, self.demo_noise = state_dim, action_dim, demo_noise

    def play(self, act, seeds):
        self.played.append((self.demo_noise is not None, [int(seed) for seed in seeds]))
        return super().play(act, seeds)

    def observe(self):
        state, N = super().observe()["state"], len(self.position)
        obs = {"state": nn.functional.pad(state, (0, self.state_dim - 3)),
               "tokens": told(["go through the gap"]).repeat(N, 1)}
        if self.demo_noise is not None:
            obs["action"] = torch.full((N, self.action_dim), self.still)
            obs["action"][:, :2] = torch.from_numpy(gap_world.expert_action(state.numpy()))
        return obs

    def step(self, chunks):
        assert chunks.shape[2] == self.action_dim and chunks.dtype == np.float32
        assert np.abs(chunks[..., 2:] - self.still).max() < 0.5      # its scale there is 0.01
        return super().step(chunks[..., :2])

    def change(self, changes):
        pass

    def close(self):
        pass


TOY = ("--num-demos 3 --sft-steps 30 --iterations 3 --episodes 16 --eval-every 2 --eval-episodes 9 "
       "--test-episodes 10 --minibatch 30 --lr 1e-3").split()


def toy_world(args, *more, demo_noise=None, test=False, film=None):
    return Toy(args.state_dim, 7, demo_noise)


@pytest.fixture
def toy(monkeypatch):
    """04 on the toy world, with five official starts in a task."""
    monkeypatch.setattr(robot, "make_world", toy_world)
    monkeypatch.setattr(libero, "NUM_OFFICIAL", 5)
    monkeypatch.setattr(Toy, "played", [])


def ran(*flags, script=SCRIPT):
    """A run in this process that ends well -> its RESULT as a dict of words, all it printed."""
    code, out, err = run_main(script, *flags)
    assert code is None, f"{code} {err}"
    word, *pairs = out.strip().splitlines()[-1].split()
    assert word == "RESULT"
    return dict(pair.split("=") for pair in pairs), out


def table(path, *without):
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


def log_of(folder):
    return table(folder / "log.csv", "rollout_seconds", "update_seconds")


def content(folder, name="last.pt"):
    """The tensors of a checkpoint, flat."""
    flat, todo = {}, [("", torch.load(folder / name, weights_only=True))]
    while todo:
        path, value = todo.pop()
        if isinstance(value, dict):
            todo += [(f"{path}/{k}", v) for k, v in value.items() if k != "flags"]
        elif torch.is_tensor(value):
            flat[path] = value
    return flat


def run_and_cut(folder, patch, *flags, script=SCRIPT, after=1):
    """A run in folder/whole, and in folder/cut what it had saved `after` that many iterations.

    There the log has one row more: that of an iteration whose checkpoint was not written any more.
    """
    save = robot.save

    def copying(path, policy, args, **more):
        save(path, policy, args, **more)
        if more and more["state"]["iteration"] == after:
            shutil.copytree(path.parent, folder / "cut")
            with open(folder / "cut" / "log.csv", "a") as file:
                columns = (folder / "cut" / "log.csv").read_text().splitlines()[0].split(",")
                file.write(",".join([str(after + 1)] + ["7"] * (len(columns) - 1)) + "\n")

    patch.setattr(robot, "save", copying)
    told = ran(*flags, "--out", folder / "whole", script=script)
    patch.setattr(robot, "save", save)
    return told


def same_run(a, b):
    """Two folders hold the same log, tables and tensors."""
    assert log_of(a) == log_of(b) and table(a / "test.csv") == table(b / "test.csv")
    one, two = content(a), content(b)
    assert one.keys() == two.keys() and len(one) > 20
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_trains_tests_logs_and_draws(toy, tmp_path):
    result, out = ran(*TOY, "--out", tmp_path / "new")
    assert set(result) == {"suite", "task", "sft", "stepnft", "episodes", "env_steps", "seconds"}
    assert result["episodes"] == "48" and result["suite"] == "libero_object"
    log, rows = log_of(tmp_path / "new"), table(tmp_path / "new" / "test.csv")
    assert [row["episodes"] for row in log] == ["16", "32", "48"]
    assert log[-1]["env_steps"] == result["env_steps"]
    assert [row["eval_ode"] != "" for row in log] == [False, True, True]
    assert all(math.isfinite(float(row["loss"])) for row in log)
    assert [(row["policy"], row["starts"], row["episodes"]) for row in rows] == [
        (policy, *starts) for starts in (("official initial states", "5"),
                                         ("random placements", "10"))
        for policy in ("SFT", "pi-StepNFT")]
    assert rows[0]["success"][:5].startswith(str(float(result["sft"])))
    assert (tmp_path / "new" / "learning.png").stat().st_size > 5000
    sft, last = content(tmp_path / "new", "sft.pt"), content(tmp_path / "new")
    assert any(not torch.equal(sft[name], last[name]) for name in sft)
    assert "max_steps=160" in out.split("\n")[0].split()         # the flags as they were filled in
    for what in ("validation, SFT", "validation, iteration 3", "pi-StepNFT", "SFT: flow matching"):
        assert what in out


def test_demos_training_validation_and_test_share_no_start(toy, tmp_path):
    ran(*TOY, "--out", tmp_path / "new", "--group-size", 4)
    demos = [seeds for scripted, seeds in Toy.played if scripted]
    others = [seeds for scripted, seeds in Toy.played if not scripted]
    validation, train = [others[i] for i in (0, 3, 5)], [others[i] for i in (1, 2, 4)]
    official, test = others[6:8], others[8:]
    assert official == [[0, 1, 2, 3, 4]] * 2
    assert validation == [validation[0]] * 3 and test == [test[0]] * 2
    kinds = [set(sum(demos, [])), set(sum(train, [])), set(validation[0]), set(test[0]),
             set(official[0])]
    assert [len(kind) for kind in kinds] == [3, 3 * 16 // 4, 9, 10, 5]
    assert len(set.union(*kinds)) == sum(map(len, kinds))
    for seeds in train:                                    # four neighbours share their start
        assert [len(set(seeds[i:i + 4])) for i in range(0, 16, 4)] == [1] * 4


def test_a_run_cut_short_and_resumed_is_the_run_that_was_not(toy, tmp_path, monkeypatch):
    """Log, tables and every tensor; a row whose checkpoint is missing does not come twice."""
    told, _ = run_and_cut(tmp_path, monkeypatch, *TOY, after=2)
    assert [row["iteration"] for row in log_of(tmp_path / "cut")] == ["1", "2", "3"]
    resumed, _ = ran("--resume", "--out", tmp_path / "cut")
    same_run(tmp_path / "whole", tmp_path / "cut")
    assert {**told, "seconds": ""} == {**resumed, "seconds": ""}
    ran("--resume", "--out", tmp_path / "cut", "--iterations", 4)  # and may grow
    assert [row["iteration"] for row in log_of(tmp_path / "cut")] == ["1", "2", "3", "4"]


def test_two_tasks_share_a_policy_that_can_be_tested_on_one(toy, tmp_path):
    """--eval-only needs no flag; its rows are added to the table under the path of the policy."""
    out = tmp_path / "new"
    result, _ = ran(*TOY, "--tasks", 0, 3, "--iterations", 1, "--out", out)
    assert result["task"] == "0,3"
    assert robot.load_policy(out / "last.pt").config["language"]
    before = table(out / "test.csv")
    assert [(row["task"], row["episodes"]) for row in before[:4]] == [("0", "5"), ("3", "5")] * 2
    again, _ = ran("--eval-only", out / "last.pt", "--out", out)
    assert again["task"] == "0,3" and again["success"] == result["stepnft"]
    alone, _ = ran("--eval-only", out / "last.pt", "--out", out, "--tasks", 3)
    assert alone["task"] == "3"
    rows = table(out / "test.csv")
    assert rows[:len(before)] == before and len(rows) == 8 + 4 + 2
    assert {row["policy"] for row in rows[8:]} == {str(out / "last.pt")}
    assert [row["task"] for row in rows[8:]] == ["0", "3", "0", "3", "3", "3"]


@pytest.mark.parametrize("seed", [123456789, 2**40])
def test_any_seed_works(toy, tmp_path, seed):
    ran(*TOY, "--iterations", 1, "--seed", seed, "--out", tmp_path / "new")
    assert all(0 <= s < 2**31 + 1000 for _, seeds in Toy.played for s in seeds)


def test_sft_of_another_run_is_where_a_run_starts(toy, tmp_path):
    result, _ = ran(*TOY, "--iterations", 0, "--out", tmp_path / "first")
    assert "sft" in result and "stepnft" not in result             # nothing was trained
    assert not (tmp_path / "first" / "log.csv").exists()
    Toy.played.clear()
    ran(*TOY, "--sft", tmp_path / "first" / "sft.pt", "--out", tmp_path / "second", "--lr", 1e-9)
    assert not any(scripted for scripted, _ in Toy.played)         # no demos are needed
    first, second = (content(tmp_path / name, "sft.pt") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert table(tmp_path / "first" / "test.csv")[0] == table(tmp_path / "second" / "test.csv")[0]


def test_an_action_that_is_held_is_the_mean_of_the_steps_that_it_replaces(toy, monkeypatch,
                                                                          tmp_path):
    seen = []
    monkeypatch.setattr(flow, "train_sft", lambda policy, obs, chunks, *rest: seen.append(
        (policy, obs, chunks)) or 0.0)
    monkeypatch.setattr(robot, "save", lambda *content: None)
    args = SimpleNamespace(resume=None, sft=None, horizon=2, action_repeat=3, seed=0, device="cpu",
                           sft_steps=1, sft_lr=1e-3, sft_batch=256, out=tmp_path, tasks=[0],
                           obs="state", state_dim=18, policy=None, micro_batch=32)
    actions = [torch.rand(7, 7) * 2 - 1, torch.rand(4, 7)]
    demos = [({"state": torch.randn(len(a), 18)}, a) for a in actions]
    robot.clone(args, robot.make_policy, lambda args: demos)
    (policy, obs, chunks), = seen
    assert policy.horizon == 2 and torch.equal(obs["state"], torch.cat([d["state"]
                                                                        for d, _ in demos]))
    wanted = [[[sum(a[min(i + 3 * h + r, len(a) - 1), dim].item() for r in range(3)) / 3
                for dim in range(7)] for h in range(2)] for a in actions for i in range(len(a))]
    torch.testing.assert_close(chunks, torch.tensor(wanted))


def test_ten_tasks_take_turns_and_groups_stay_together():
    args = SimpleNamespace(tasks=[2, 5, 7])
    seeds = robot.random_starts(args, "train", 12, 0, 4, group_size=2)
    tasks, numbers = seeds // libero.TASK, seeds % libero.TASK
    assert tasks.tolist() == [2, 2, 5, 5, 7, 7] * 2
    assert (numbers[::2] == numbers[1::2]).all() and len(set(numbers.tolist())) == 6
    assert (numbers >= 1000).all()


# ------------------------------------------------------------------------------------------------
# Checkpoints and tables


def saved(path, policy, **flags):
    robot.save(path, policy, SimpleNamespace(flags={"script": SCRIPT, **flags}), note={"n": 7})


def test_a_checkpoint_comes_back_whole(tmp_path):
    policy, obs = full_policy(), full_obs()
    policy.fit_normalisation(obs, torch.rand(3, 4, 3))
    saved(tmp_path / "p.pt", policy, seed=3)
    loaded = robot.load_policy(tmp_path / "p.pt")
    x_t, t = torch.randn(3, 4, 3), torch.rand(3)
    assert torch.equal(loaded.velocity(x_t, t, loaded.encode(obs)),
                       policy.velocity(x_t, t, policy.encode(obs)))
    assert torch.equal(loaded.denormalise(x_t), policy.denormalise(x_t))
    actions = torch.rand(3, 4, 3)
    assert torch.equal(loaded.normalise(actions), policy.normalise(actions))
    content = torch.load(tmp_path / "p.pt", weights_only=True)     # nothing in it is a program
    assert content["note"] == {"n": 7} and content["flags"] == {"script": SCRIPT, "seed": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["p.pt"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    policy = robot.RobotPolicy(1, 1, 1)
    saved(tmp_path / "p.pt", policy, seed=1)

    def dies_halfway(content, file):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", dies_halfway)
    with pytest.raises(OSError):
        saved(tmp_path / "p.pt", policy, seed=2)
    assert torch.load(tmp_path / "p.pt", weights_only=True)["flags"]["seed"] == 1


@pytest.mark.parametrize("k, n", [(0, 20), (7, 20), (20, 20), (431, 1000), (1, 1)])
def test_a_rate_has_wilsons_interval(k, n):
    z, p = 1.959964, k / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    row = robot.rated(np.arange(n) < k)
    assert row["episodes"] == n and row["success"] == pytest.approx(p)
    assert row["low"] == pytest.approx(centre - half, abs=1e-5)
    assert row["high"] == pytest.approx(centre + half, abs=1e-5)


# ------------------------------------------------------------------------------------------------
# Demonstrations of a scripted expert that sometimes fails


class Moody:
    """A simulator whose expert says 1. A mood that hangs on the seed decides if that helps; the
    third time is the last."""

    def __init__(self, hope):
        self.hope = hope

    @staticmethod
    def good(seed, hope):
        return np.random.default_rng(seed).random() < hope

    def reset(self, seed):
        self.seed, self.step = seed, 0

    def advance(self, action):
        assert np.allclose(action, [1, 0.1 * self.step])
        self.step += 1
        return self.step == 3 and self.good(self.seed, self.hope)

    def observe(self):
        return {"state": np.float32([self.seed, self.step]),
                "action": np.float32([1, 0.1 * self.step])}


def moody_workers(hope):
    box = gym.spaces.Box
    space = gym.spaces.Dict({"state": box(-np.inf, np.inf, (2,)), "action": box(-1, 1, (2,))})
    make_env = functools.partial(workers.ChunkEnv, functools.partial(Moody, hope), space, 2, 4, 1)
    return workers.Workers(make_env, 2)


def test_scripted_demos_keep_the_first_successes_of_each_task():
    """Two tasks in two real processes, the expert fails every second time."""
    candidates = [range(1000, 1040), range(2000, 2040)]
    demos = robot.scripted_demos(moody_workers(0.5), candidates, 4)
    wanted = [[seed for seed in seeds if Moody.good(seed, 0.5)][:4] for seeds in candidates]
    assert wanted[0][-1] > 1004                                    # some did fail
    assert sorted(int(rows["state"][0, 0]) for rows, _ in demos) == sum(wanted, [])
    for rows, actions in demos:
        assert rows["state"][:, 1].tolist() == [0, 1, 2]
        assert len(set(rows["state"][:, 0].tolist())) == 1        # all of one episode
        torch.testing.assert_close(actions, torch.tensor([[1, 0], [1, 0.1], [1, 0.2]]))
        assert set(rows) == {"state"}                             # what was observed, no more


def test_an_expert_that_never_succeeds_gets_one_line():
    with pytest.raises(SystemExit, match="^--num-demos 4: [^\n]*$"):
        robot.scripted_demos(moody_workers(0.0), [range(8)], 4)


# ------------------------------------------------------------------------------------------------
# Flags


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of finished toy runs of 04 (and, for its script, one of 05), never changed."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robot, "make_world", toy_world)
        patch.setattr(libero, "NUM_OFFICIAL", 5)
        ran(*TOY, "--iterations", 1, "--seed", 3, "--tasks", 0, 1, "--out", folder / "04")
    shutil.copytree(folder / "04", folder / "05")
    content = torch.load(folder / "04" / "last.pt", weights_only=True)
    content["flags"]["script"] = "05_train_maniskill.py"
    torch.save(content, folder / "05" / "last.pt")
    return folder


def filled(flags, runs):
    return [str(flag).replace("RUN", str(runs / "04")).replace("OTHER", str(runs / "05"))
            .replace("README", str(ROOT / "README.md")) for flag in flags.split()]


WRONG = [
    ("--suite libero_objects", "--suite libero_objects"), ("--tasks 10", "--tasks", "10", "0 to 9"),
    ("--tasks x", "--tasks", "x"), ("--tasks -1", "--tasks"), ("--num-demos 0", "--num-demos"),
    ("--suite libero_10 --tasks 2", "--tasks", "no scripted expert", "libero_10"),
    ("--suite libero_10 --tasks all", "--tasks", "no scripted expert"),
    ("--eval-only nothing.pt", "--eval-only", "nothing.pt"), ("--eval-only README", "--eval-only"),
    ("--sft README", "--sft", "checkpoint"), ("--sft nothing.pt", "--sft", "nothing.pt"),
    ("--device nonsense", "--device", "nonsense"), ("--action-repeat 0", "--action-repeat"),
    ("--sft-steps 0", "--sft-steps"), ("--eval-suites libero_10", "--eval-suites libero_10"),
    ("--eval-suites nonsense", "--eval-suites", "nonsense"), ("--out a_file/new", "--out a_file"),
    ("--noise-level nan", "--noise-level"), ("--noise-level inf", "--noise-level"),
    ("--noise-level 0", "--noise-level"), ("--lr 0", "--lr"), ("--lr -1", "--lr"),
    ("--ema 2 3", "--ema"), ("--ema 0.9 0.1", "--ema 0.9 0.1"), ("--eval-every 0", "--eval-every"),
    ("--minibatch 0", "--minibatch"), ("--epochs 0", "--epochs"), ("--horizon 0", "--horizon"),
    ("--episodes 12", "--episodes 12", "8"), ("--demos nowhere", "--demos nowhere"),
    ("--image-size 8", "--image-size"), ("--seed -1", "--seed"), ("--max-steps 0", "--max-steps"),
    ("--demo-noise -1", "--demo-noise"), ("--num-envs 0", "--num-envs"), ("--video -1", "--video"),
    ("--resume --out missing", "--resume", "last.pt"), ("--resume --out a_file", "--resume"),
    ("--out RUN", "--out", "--resume"), ("--steps 3", "--steps"), ("--obs depth", "--obs"),
    ("--resume --out RUN --seed 5", "--seed 5"), ("--resume --out RUN --lr 1e-4", "--lr"),
    ("--resume --out RUN --suite libero_goal", "--suite libero_goal"),
    ("--resume --out RUN --horizon 3", "--horizon 3"),
    ("--resume --out RUN --tasks 0", "--tasks"),
    ("--eval-only RUN/last.pt --seed 5", "--seed 5"),
    ("--eval-only RUN/last.pt --horizon 8", "--horizon 8"),
    ("--eval-only RUN/sft.pt --suite libero_goal", "--suite libero_goal"),
    ("--eval-only OTHER/last.pt", "05_train_maniskill.py"),
    ("--resume --out OTHER", "05_train_maniskill.py"),
    ("--sft RUN/sft.pt --tasks 0 1 --horizon 3", "--sft", "horizon"),
    ("--sft RUN/sft.pt --tasks 0", "--sft", "language"),
]


@pytest.mark.parametrize("flags, words", [(flags, words) for flags, *words in WRONG],
                         ids=[flags for flags, *_ in WRONG])
def test_a_wrong_call_gets_one_line_that_names_the_flag(flags, words, runs):
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    line = wrong_call(SCRIPT, *filled(flags, runs))
    assert all(word in line for word in words), line
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_gets_one_line():
    assert "--device" in wrong_call(SCRIPT, "--device", "cuda")


def test_a_broken_last_checkpoint_gets_one_line(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"half")
    line = wrong_call(SCRIPT, "--resume", "--out", tmp_path)
    assert "--resume" in line and "sft.pt, log.csv" in line
    for name in ("sft.pt", "log.csv"):
        (tmp_path / name).touch()
    assert "last.pt" in wrong_call(SCRIPT, "--resume", "--out", tmp_path)


def test_every_task_is_trained_when_an_iteration_has_fewer_starts_than_tasks():
    args, played = SimpleNamespace(tasks=list(range(10))), []
    for iteration in range(5):
        seeds = robot.random_starts(args, "train", 32, 0, iteration, group_size=8)
        assert len(set(seeds.tolist())) == 4 and (seeds.reshape(4, 8) == seeds[::8, None]).all()
        played += (seeds[::8] // libero.TASK).tolist()
    assert played == [*range(10)] * 2                     # in turn, across iterations


def test_a_run_killed_before_its_first_checkpoint_can_start_again(toy, tmp_path):
    """Its log may hold a row: neither `--resume` nor a new start may be refused for ever."""
    (tmp_path / "log.csv").write_text("iteration,episodes,loss\n1,16,0.7\n")
    ran(*TOY, "--iterations", 1, "--out", tmp_path)
    assert [row["iteration"] for row in log_of(tmp_path)] == ["1"]


def test_a_run_resumed_keeps_the_sft_policy_it_started_from(runs, capsys):
    with pytest.raises(SystemExit):
        parse("--resume", "--out", runs / "04", "--sft", runs / "04" / "last.pt")
    assert "--sft" in capsys.readouterr().err


def test_a_wrong_call_leaves_nothing_but_its_line(tmp_path):
    """Once as a user calls it: no warning beside the line, either."""
    done = run_script(SCRIPT, "--out", ROOT / "README.md" / "new", cwd=tmp_path, ok=False)
    assert "--out" in one_clear_line(done) and not any(tmp_path.iterdir())


def parse(*flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [SCRIPT])
        return robot.parse_args([str(flag) for flag in flags])


def test_flags_come_from_the_checkpoint(runs, tmp_path):
    """Those of the run, but where and on what to compute is the call's business."""
    for call in (["--resume", "--out", runs / "04"], ["--eval-only", runs / "04" / "sft.pt",
                                                      "--out", tmp_path / "new"]):
        args = parse(*call)
        assert (args.seed, args.tasks, args.episodes, args.lr) == (3, [0, 1], 16, 1e-3)
        assert args.out == Path(call[-1]) and args.test_episodes == 10
    same = parse("--resume", "--out", runs / "04", "--seed", 3, "--lr", 1e-3, "--num-envs", 3,
                 "--test-episodes", 50, "--iterations", 9)
    assert (same.num_envs, same.test_episodes, same.iterations, same.seed) == (3, 50, 9, 3)
    assert same.resume == runs / "04" / "last.pt"


def test_a_policy_can_be_tested_where_its_recorded_demos_are_not(runs, tmp_path):
    """Checkpoints are exchanged; the demonstrations stay where they were."""
    content = torch.load(runs / "04" / "last.pt", weights_only=True)
    content["flags"]["demos"] = "/a/folder/elsewhere"
    torch.save(content, tmp_path / "last.pt")
    args = parse("--eval-only", tmp_path / "last.pt", "--out", tmp_path / "new")
    assert args.max_steps == libero.TIME_LIMITS["libero_object"]


def test_a_perturbed_suite_may_be_named_by_its_ending(tmp_path):
    args = parse("--eval-suites", "_lan", "libero_object_swap", "--out", tmp_path)
    assert args.eval_suites == ["libero_object_lan", "libero_object_swap"]


def test_every_suite_is_tested_under_its_own_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(libero, "make_workers", lambda *rest, max_steps, **more: max_steps)
    flags = ["--suite", "libero_goal", "--tasks", 1, "--eval-suites", "libero_spatial", "--out",
             tmp_path]
    args = parse(*flags)
    assert [robot.make_world(args, suite, test=True) for suite in
            (None, "libero_goal_lan", "libero_spatial")] == [300, 300, 220]
    assert robot.make_world(args) == 160                           # training
    args = parse(*flags, "--test-max-steps", 400)
    assert robot.make_world(args, "libero_spatial", test=True) == 400
    assert robot.make_world(args) == 200


def test_a_clone_is_compared_without_building_a_network(runs, tmp_path, monkeypatch):
    """A large one would need its memory twice. The wrong calls above say what is refused."""
    monkeypatch.setattr(robot, "build_policy", None)
    args = parse("--sft", runs / "04" / "sft.pt", "--tasks", 0, 1, "--out", tmp_path)
    config = torch.load(args.sft, weights_only=True)["config"]
    assert config == robot.policy_config(args)                     # nothing is left to a default


# ------------------------------------------------------------------------------------------------
# Several ranks. They are processes; what they share is what gloo carries between them.


def recorded_steps(rows):
    """What an SDE rollout of the toy policy would have recorded in that many chunks."""
    torch.manual_seed(5)
    policy, obs = toy_policy(), {"state": torch.randn(rows, 3)}
    with torch.no_grad():
        actions, record = nft.explore(policy, 4, 0.5)(obs)
    return {**obs, **record, "k": torch.arange(4).expand(rows, -1),
            "mask": torch.arange(2) < 1 + torch.arange(rows)[:, None] % 2,
            "y": torch.where(torch.arange(rows) % 3 > 0, 1.0, -1.0),
            "episode": torch.arange(rows) // 3}


def toy_policy():
    torch.manual_seed(1)
    return flow.FlowPolicy(2, 2, state_dim=3, width=16)


def vector(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def updated(batch):
    """A policy after three whole-batch steps of SGD, from a fixed start."""
    policy = toy_policy()
    robot.average_gradients(policy)
    nft.update(policy, torch.optim.SGD(policy.parameters(), lr=0.5), batch, epochs=3,
               minibatch=100)
    return vector(policy)


def learned(rank):
    """A policy after iterations whose ranks have 9 and 4 rows, then 3 and 8: minibatches of 2."""
    policy = toy_policy()
    robot.average_gradients(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    args = SimpleNamespace(group_size=1, num_steps=4, transitions="one", epochs=2, minibatch=2,
                           target="next", beta=1.0, max_drift=0.5, dpo_beta=1.0)
    torch.manual_seed(rank)
    for rows in ((9, 4), (3, 8)):
        batch = recorded_steps(rows[rank])
        torch.manual_seed(10 + rank)
        robot.StepNFT(args).learn(policy, optimizer, batch, np.arange(5) < 1 + rank)
    return vector(policy)


def one_of_two_ranks(rank, port, folder):
    for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=port).items():
        os.environ[name] = str(value)
    torch.set_num_threads(1)
    own = folder / f"own{rank}"                     # where this rank stands
    own.mkdir()
    os.chdir(own)
    os.dup2(os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY), 1)
    robot.make_world, libero.NUM_OFFICIAL, told = toy_world, 5, {}
    train = robot.train

    def train_and_tell(args, sft, *rest):
        policy, env_steps = train(args, sft, *rest)
        told.update(sft=vector(sft), policy=vector(policy), env_steps=env_steps,
                    still=rank if args.out == folder / "run" else None)
        return policy, env_steps

    robot.train = train_and_tell
    sys.argv = [SCRIPT, *TOY, "--out", str(folder / "run")]
    robot.main()                                    # joins the ranks, and the whole run with them
    sys.stdout.flush()
    batch = recorded_steps(12)
    told["updated"] = updated(flow.take(batch, slice(6 * rank, 6 * rank + 6)))
    told["learned"] = learned(rank)
    told["equal"] = len(robot.equal_rows(recorded_steps(5 + 3 * rank))["y"])
    told["shared"] = torch.tensor(robot.share(range(7)))
    told["gathered"] = robot.gather(told["shared"])
    told["arrays"] = torch.from_numpy(robot.gather(np.array([rank == 0])))
    told["left"] = [str(path) for path in Path().rglob("*")]
    torch.save(told, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Two ranks of a whole toy run and of the pieces -> what each told, and the folder."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two_ranks, (port, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)], folder


def test_ranks_with_equal_rows_update_like_one_with_the_joined_batch(ranks):
    alone = updated(recorded_steps(12))
    assert (alone - vector(toy_policy())).abs().max() > 1e-3
    for told in ranks[0]:
        torch.testing.assert_close(told["updated"], alone, rtol=1e-4, atol=1e-6)


def test_ranks_stay_equal_after_updates_with_unequal_rows(ranks):
    first, second = ranks[0]
    assert (first["learned"] - vector(toy_policy())).abs().max() > 1e-2
    for name in ("learned", "sft", "policy"):
        assert torch.equal(first[name], second[name])
    assert not torch.equal(first["sft"], first["policy"])
    assert first["env_steps"] == second["env_steps"]


def test_ranks_share_and_gather(ranks):
    first, second = ranks[0]
    assert first["shared"].tolist() == [0, 1, 2, 3] and second["shared"].tolist() == [4, 5, 6]
    for told in (first, second):
        assert told["gathered"].tolist() == [*range(7)]
        assert told["arrays"].tolist() == [True, False] and told["equal"] == 5


def test_only_rank_0_prints_and_writes(ranks):
    told, folder = ranks
    first, second = ((folder / f"{rank}.txt").read_text() for rank in range(2))
    assert first.count("RESULT") == 1 and second == ""
    assert told[1]["left"] == [] and told[1]["still"] is None and told[0]["still"] == 0
    assert [row["episodes"] for row in log_of(folder / "run")] == ["16", "32", "48"]
    rows = table(folder / "run" / "test.csv")
    assert [row["episodes"] for row in rows] == ["5", "5", "10", "10"]
    told = first.strip().splitlines()[-1].split()
    assert f"env_steps={log_of(folder / 'run')[-1]['env_steps']}" in told


def test_without_torchrun_one_rank_has_everything():
    assert robot.rank_of() == (0, 1) and robot.share(range(3)).tolist() == [0, 1, 2]
    assert robot.gather(torch.arange(3)).tolist() == [0, 1, 2]
    batch = recorded_steps(4)
    assert robot.equal_rows(batch) is batch


@pytest.mark.parametrize("flags, words", [
    ("--episodes 24", ["--episodes 24", "16"]), ("--test-episodes 1", ["--test-episodes"])])
def test_ranks_that_cannot_share_get_one_line(flags, words, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = wrong_call(SCRIPT, *flags.split())
    assert all(word in line for word in words), line


# ------------------------------------------------------------------------------------------------
# The real simulator


@sim
def test_rgb_from_recorded_demos_to_evaluation_and_film(recorded, tmp_path, gl, monkeypatch):
    monkeypatch.setattr(libero, "NUM_OFFICIAL", 1)
    result, told = ran(*"--obs rgb --image-size 48 --sft-steps 3 --episodes 8 --iterations 1 "
                       "--max-steps 4 --test-max-steps 4 --eval-episodes 1 --eval-every 1 "
                       "--num-envs 1 --test-episodes 1 --video 1".split(),
                       "--demos", recorded[0], "--out", tmp_path / "new")
    assert result.keys() >= {"sft", "stepnft"}
    log, = log_of(tmp_path / "new")
    assert log["env_steps"] == "32" and 0 < float(log["loss"]) < 2
    assert log["train_sde"] == "0.0" and "no episode succeeded" in told  # in four control steps
    film, = (tmp_path / "new" / "videos").iterdir()
    assert film.name.startswith("task0_") and film.suffix == ".mp4" and film.stat().st_size > 1000
    policy = robot.load_policy(tmp_path / "new" / "last.pt")
    assert policy.config["cameras"] == 2 and policy.config["state_dim"] == 6


@sim
def test_rgb_sft_beats_a_policy_that_sees_nothing(gl):
    """One rendered demo of the expert trains, another is held out."""
    args = SimpleNamespace(suite="libero_object", tasks=[0], obs="rgb", num_demos=2, seed=0, gl=gl,
                           demos="scripted", demo_noise=0.2, image_size=48, num_envs=2, horizon=4,
                           state_dim=6, action_repeat=1, max_steps=140)
    demos = robot.collect_demos(args)
    assert len(demos) == 2 and demos[0][0]["rgb"].shape[1:] == (2, 3, 48, 48)
    losses = []
    for seen in (1, 0):
        shown = [{k: seen * rows[k] for k in ("state", "rgb")} for rows, _ in demos]
        chunks = [flow.sliding_chunks(actions, 4) for _, actions in demos]
        torch.manual_seed(0)
        policy = robot.RobotPolicy(4, 7, state_dim=6, cameras=2)
        flow.train_sft(policy, shown[0], chunks[0], 200, batch_size=32)
        with torch.no_grad():
            torch.manual_seed(1)
            losses.append(np.mean([flow.flow_matching_loss(
                policy, shown[1], policy.normalise(chunks[1])).item() for _ in range(5)]))
    assert losses[0] < 0.9 * losses[1], losses


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


def kill_a_worker(script, *flags, cwd, when, wait=1.0):
    """A run whose worker process is killed after a line with `when` -> the one line it answers."""
    run = subprocess.Popen([sys.executable, str(ROOT / script), *map(str, flags)], cwd=cwd,
                           text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    while when not in run.stdout.readline():
        assert run.poll() is None, run.stderr.read()
    time.sleep(wait)
    os.kill(children(run.pid)[-1], signal.SIGKILL)
    _, errors = run.communicate(timeout=120)
    lines = errors.strip().splitlines()
    assert run.returncode == 1 and len(lines) == 1, errors
    return lines[0]


@sim
def test_a_worker_that_dies_a_run_resumed_and_perturbed_suites(recorded, tmp_path, monkeypatch):
    """Cut after one iteration, resumed, killed in the second, resumed again: as if never cut."""
    flags = ("--sft-steps 5 --iterations 2 --episodes 48 --max-steps 8 --eval-every 1 "
             "--test-max-steps 8 --eval-episodes 2 --test-episodes 1 --num-envs 1 "
             "--eval-suites _lan --lr 1e-3").split() + ["--demos", recorded[0]]
    monkeypatch.setattr(libero, "NUM_OFFICIAL", 2)
    told, _ = run_and_cut(tmp_path, monkeypatch, *flags)
    line = kill_a_worker(SCRIPT, "--resume", "--out", tmp_path / "cut", "--num-envs", 1,
                         cwd=tmp_path, when="iteration 2/2")
    assert "--resume" in line and "task 0 from placement " in line
    seed = int(line.split("(seed ")[1].split(")")[0])
    assert seed in robot.random_starts(SimpleNamespace(tasks=[0]), "train", 48, 0, 1, group_size=8)
    resumed, _ = ran("--resume", "--out", tmp_path / "cut", "--num-envs", 1)
    same_run(tmp_path / "whole", tmp_path / "cut")
    assert {**told, "seconds": ""} == {**resumed, "seconds": ""}
    rows = table(tmp_path / "cut" / "test.csv")
    assert [(row["policy"], row["suite"], row["episodes"]) for row in rows] == [
        (policy, suite, episodes) for suite, episodes in (
            ("libero_object", "2"), ("libero_object", "1"), ("libero_object_lan", "2"))
        for policy in ("SFT", "pi-StepNFT")]
