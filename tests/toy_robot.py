"""04 and 05 without a simulator: GapWorld in a robot's clothes, for whole runs; and a diary of a
run whose policies are one number each, so that everybody can be told apart."""

import csv
import importlib
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from conftest import run_main
from envs import gap_world, libero, maniskill, workers
from tools import files, run

robot, compare = map(importlib.import_module, ("04_train_libero", "05_train_maniskill"))
SCRIPTS = {"04_train_libero.py": robot, "05_train_maniskill.py": compare}

# ------------------------------------------------------------------------------------------------
# Whole runs


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
        said = torch.tensor(workers.tokens("go through the gap"))
        obs = {"state": nn.functional.pad(state, (0, self.state_dim - 3)),
               "tokens": said.repeat(N, 1)}
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


TOY = ("--num-demos 3 --sft-steps 10 --sft-batch 32 --iterations 3 --episodes 16 --eval-every 2 "
       "--eval-episodes 9 --test-episodes 10 --minibatch 30 --lr 1e-3").split()


def libero_toy(args, *more, demo_noise=None, test=False, film=None):
    return Toy(args.state_dim, 7, demo_noise)


def maniskill_toy(args, demo_noise=None, film=None):
    return Toy(11, 4, demo_noise)


def dress(patch, curves=False, small=True):
    """04 and 05 on the toy world, with five official starts in a task. small: their networks are.
    Curves take a third of a run's time to draw: without them an empty file stands there."""
    patch.setattr(robot, "make_world", libero_toy)
    patch.setattr(compare, "make_world", maniskill_toy)
    patch.setattr(libero, "NUM_OFFICIAL", 5)
    patch.setattr(Toy, "played", [])
    for script in (robot, compare):
        if small:
            patch.setattr(script, "policy_config", lambda args, config=script.policy_config:
                          {**config(args), "width": 32})
        if not curves:
            patch.setattr(script, "learning_figure", lambda log, path: path.touch())


def ran(*flags, script="04_train_libero.py"):
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


def run_and_cut(folder, patch, *flags, script="04_train_libero.py", after=1):
    """A run in folder/whole, and in folder/cut what it had saved `after` that many iterations.

    There the log has one row more: that of an iteration whose checkpoint was not written any more.
    """
    save = run.save

    def copying(path, policy, args, **more):
        save(path, policy, args, **more)
        if more and more["state"]["iteration"] == after:
            shutil.copytree(path.parent, folder / "cut")
            with open(folder / "cut" / "log.csv", "a") as file:
                columns = (folder / "cut" / "log.csv").read_text().splitlines()[0].split(",")
                file.write(",".join([str(after + 1)] + ["7"] * (len(columns) - 1)) + "\n")

    patch.setattr(run, "save", copying)
    told = ran(*flags, "--out", folder / "whole", script=script)
    patch.setattr(run, "save", save)
    return told


def same_run(a, b):
    """Two folders hold the same log, tables and tensors."""
    assert log_of(a) == log_of(b) and table(a / "test.csv") == table(b / "test.csv")
    one, two = content(a), content(b)
    assert one.keys() == two.keys() and len(one) > 20
    assert all(torch.equal(one[name], two[name]) for name in one)


def release(folder):
    """This process gives its claim on a folder up, as if it had ended."""
    held = files.HELD.pop(Path(folder).resolve(), None)
    if held:
        held.close()


# ------------------------------------------------------------------------------------------------
# The diary of a run. A policy is one number, `mark`: the clone's is 0, and every update adds 1.


class Marked(nn.Module):
    """All its paths end in the chunk whose every entry is `mark`."""

    context_dim, config = 2, {"kind": "marked"}

    def __init__(self, horizon, action_dim):
        super().__init__()
        self.horizon, self.action_dim = horizon, action_dim
        self.mark = nn.Parameter(torch.zeros(()))

    def encode(self, obs):
        return obs["state"][:, :2]

    def velocity(self, x_t, t, ctx):
        return (x_t - self.mark) / t[:, None, None]

    def denormalise(self, x_0):
        return x_0


class Diary:
    """What happened in a run, in its order: a list of dicts, `what` of each is "made", "closed",
    "act" (with noise), "play" (without), "learn" or "film"."""

    def __init__(self):
        self.pages = []

    def write(self, what, **more):
        self.pages.append(SimpleNamespace(what=what, **more))

    def of(self, *kinds):
        return [page for page in self.pages if page.what in kinds]

    def marks(self, *kinds):
        return [page.mark for page in self.of(*kinds)]


class DiaryWorld:
    """A world of one chunk an episode; every third start succeeds. It writes down who acted, on
    which seeds and, if there was noise on the way, with which draws."""

    def __init__(self, diary, horizon, **made):
        self.diary, self.horizon, self.made = diary, horizon, made
        diary.write("made", **made)

    def play(self, act, seeds):
        seeds = np.asarray(seeds)
        obs = {"state": torch.zeros(len(seeds), 3)}
        actions, record = act(obs)
        told = dict(seeds=seeds.tolist(), made=self.made)
        if "x" in record:        # from x_1 to mark in one step of length 1: v = x_1 - mark
            marks = record["x"][:, 0] - record["v"][:, 0]
            self.diary.write("act", mark=round(marks.mean().item(), 4), x_1=record["x"][:, 0],
                             sigma=record["sigma"], **told)
            assert marks.std() < 1e-4
        else:
            assert actions.std() < 1e-4
            self.diary.write("play", mark=round(actions.mean().item(), 4), **told)
        mask = torch.ones(len(seeds), self.horizon, dtype=bool)
        rows = {**record, **obs, "episode": torch.arange(len(seeds)), "mask": mask}
        return seeds % 3 == 0, rows

    def change(self, changes):
        self.diary.write("changed", changes=changes)

    def close(self):
        self.diary.write("closed", **self.made)


def followed(alphas):
    """The marks of the policy that acts in each iteration, and after the last: it keeps alpha of
    itself and takes the rest from the trained one, whose mark is 1 after the first, and so on."""
    marks = [0.0]
    for i, alpha in enumerate(alphas):
        marks.append(alpha * marks[-1] + (1 - alpha) * (i + 1))
    return marks


ITERATIONS, DIARY_FLAGS = 4, ("--iterations 4 --episodes 8 --group-size 2 --eval-every 3 "
                              "--eval-episodes 5 --test-episodes 6 --lr 0.5 --seed 7").split()


def diary_of(script, *flags):
    """A run of 04 or 05 -> its Diary, with what it told and saved: result, told, log, test, sft,
    last, files. An update adds 1 to the mark and learns nothing; all the rest is real."""
    diary, module = Diary(), SCRIPTS[script]
    action_dim = 7 if module is robot else 4

    def make_world(args, suite=None, **more):
        made = {"suite": suite} if suite else {}
        return DiaryWorld(diary, args.horizon, **made, **more)

    def learned(policy, optimizer, batch, args, critic=None):
        groups = [(group["lr"], [id(p) for p in group["params"]])
                  for group in optimizer.param_groups]
        diary.write("learn", mark=round(policy.mark.item(), 4), groups=groups, batch=dict(batch),
                    policy=policy, critic=critic)
        with torch.no_grad():
            policy.mark += 1
        return {"loss": 0.5}

    def clone(args):
        run.save(args.out / "sft.pt", diary.clone, args)
        return diary.clone

    def film(args, world, policy, seeds):
        diary.write("film", mark=round(policy.mark.item(), 4), made=world.made,
                    seeds=[int(seed) for seed in seeds])

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        diary.clone = Marked(2, action_dim)
        patch.setattr(module, "make_world", make_world)
        patch.setattr(module, "clone", clone)
        patch.setattr(module, "learning_figure", lambda log, path: None)
        patch.setattr(run, "film", film)
        patch.setattr(libero, "find_gl", lambda: "egl")
        patch.setattr(maniskill, "find_renderer", lambda: "cuda")
        if module is robot:
            main = robot.main
            patch.setattr(robot, "main", lambda: main(update=learned))
        else:
            patch.setattr(compare, "update", learned)
            patch.setattr(compare, "ppo_update", lambda policy, critic, optimizer, batch, args:
                          learned(policy, optimizer, batch, args, critic))
        out = Path(folder) / "out"
        diary.result, diary.told = ran(*DIARY_FLAGS, "--horizon", 2, *flags, "--out", out,
                                       script=script)
        diary.files = {path.name for path in out.iterdir()}
        diary.log = log_of(out) if "log.csv" in diary.files else []
        diary.test = table(out / "test.csv")
        diary.sft, diary.last = (
            torch.load(out / name, weights_only=True) if name in diary.files else None
            for name in ("sft.pt", "last.pt"))
        release(out)
    return diary
