"""tools/ranks.py: one rank to which nothing changes; the share of one of several, told by hand; and
two that are processes, with what gloo carries between them."""

import contextlib
import importlib
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import made_once
from tools import ranks

flow, nft = map(importlib.import_module, ("01_flow_policy", "03_step_loss"))

# ------------------------------------------------------------------------------------------------
# One rank


def test_without_torchrun_one_rank_has_everything():
    assert ranks.rank_of() == (0, 1) and ranks.share(range(3)).tolist() == [0, 1, 2]
    assert ranks.gather(torch.arange(3)).tolist() == [0, 1, 2]
    assert ranks.gather(np.arange(3)).tolist() == [0, 1, 2]
    args = SimpleNamespace(device="cpu", out="a/folder")
    ranks.join_ranks(args)
    assert vars(args) == {"device": "cpu", "out": "a/folder"}


def test_one_rank_takes_every_row_once_in_an_epoch_in_random_order():
    epochs = [ranks.minibatches(11, 4) for _ in range(3)]
    for parts in epochs:
        assert [len(part) for part in parts] == [4, 4, 3]
        assert sorted(torch.cat(parts).tolist()) == [*range(11)]
    orders = {tuple(torch.cat(parts).tolist()) for parts in epochs}
    assert len(orders) == 3 and tuple(range(11)) not in orders


def test_gradients_of_one_rank_are_its_own():
    layer = torch.nn.Linear(2, 1)
    ranks.average_gradients(layer)
    layer(torch.ones(3, 2)).sum().backward()
    assert layer.weight.grad.tolist() == [[3, 3]]


def test_a_gradient_is_the_mean_of_all_ranks():
    """Another rank's is 7 in every entry. What is frozen has none."""
    layer = torch.nn.Linear(2, 1)
    layer.bias.requires_grad_(False)
    with rank_of_several(0, 2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks.dist, "is_initialized", lambda: True)
        patch.setattr(ranks.dist, "all_reduce", lambda gradient: gradient.add_(7))
        ranks.average_gradients(layer)
        layer(torch.ones(3, 2)).sum().backward()
    assert layer.weight.grad.tolist() == [[5, 5]] and layer.bias.grad is None


class Thing:
    """A tensor that tells where it is."""

    def __init__(self, where):
        self.where = where

    def to(self, device):
        return Thing(device)

    def cpu(self):
        return Thing("cpu")


class ThingWorld:
    """Its observation is on the CPU, and there it wants actions and records."""

    def play(self, act, seeds):
        actions, record = act({"state": Thing("cpu"), "rgb": Thing("cpu")})
        self.got = actions.where, {name: thing.where for name, thing in record.items()}
        return np.ones(len(seeds), bool), {"seeds": list(seeds)}

    def change(self, changes):
        return f"changed {changes}"

    def close(self):
        return "closed"


def test_a_policy_sees_and_acts_on_its_device_and_a_world_on_the_cpu():
    seen, world = [], ThingWorld()

    def act(obs):
        seen.append({name: thing.where for name, thing in obs.items()})
        return Thing("cuda:1"), {"x": Thing("cuda:1"), "v": Thing("cuda:1")}

    success, rows = ranks.shared(world, "cuda:1").play(act, [3, 5])
    assert seen == [{"state": "cuda:1", "rgb": "cuda:1"}]
    assert world.got == ("cpu", {"x": "cpu", "v": "cpu"})
    assert success.tolist() == [True, True] and rows == {"seeds": [3, 5]}


def test_what_else_a_world_can_do_it_can_do_shared():
    world = ranks.shared(ThingWorld(), "cpu")
    assert world.change({"a": 1}) == "changed {'a': 1}" and world.close() == "closed"
    with pytest.raises(AttributeError):
        world.fly()


# ------------------------------------------------------------------------------------------------
# One of several, which are told by hand


@contextlib.contextmanager
def rank_of_several(rank, count, gather=lambda values: values):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "rank_of", lambda: (rank, count))
        patch.setattr(ranks, "gather", gather)
        yield


class Counting:
    """One row an episode, two for those with odd seeds, which alone succeed."""

    def play(self, act, seeds):
        self.seeds = list(seeds)
        episode = [e for e, seed in enumerate(seeds) for _ in range(1 + seed % 2)]
        rows = {"episode": torch.tensor(episode, dtype=torch.long)} if len(seeds) else {}
        return np.asarray(seeds, dtype=int) % 2 == 1, rows


def test_a_rank_plays_its_share_and_counts_its_episodes_among_all():
    """Seven episodes on three ranks: 3, 2 and 2. The rows stay; the successes of all come back."""
    seeds = np.array([10, 21, 30, 41, 51, 60, 71])
    for rank, first, own in ((0, 0, [10, 21, 30]), (1, 3, [41, 51]), (2, 5, [60, 71])):
        gathered = []
        with rank_of_several(rank, 3, lambda values: gathered.append(values) or seeds % 2 == 1):
            world = Counting()
            success, rows = ranks.shared(world, "cpu").play(None, seeds)
        assert world.seeds == own
        assert success.tolist() == (seeds % 2 == 1).tolist()
        assert [values.tolist() for values in gathered] == [[seed % 2 == 1 for seed in own]]
        wanted = [first + e for e, seed in enumerate(own) for _ in range(1 + seed % 2)]
        assert rows["episode"].tolist() == wanted


def test_a_rank_without_an_episode_waits_with_the_others():
    with rank_of_several(2, 3, lambda values: np.array([True, False])):
        success, rows = ranks.shared(Counting(), "cpu").play(None, [1, 2])
    assert success.tolist() == [True, False] and rows == {}


def test_each_rank_takes_as_many_rows_as_the_one_with_fewest_and_random_ones():
    """Nine rows here, four there: four of the nine in steps of three, others in every epoch."""
    counts, seen = [], set()
    with rank_of_several(0, 2, lambda values: counts.append(values.tolist()) or torch.tensor(
            [9, 4])):
        for _ in range(20):
            parts = ranks.minibatches(9, 3)
            assert [len(part) for part in parts] == [3, 1]
            rows = torch.cat(parts).tolist()
            assert len(set(rows)) == 4 and set(rows) <= set(range(9))
            seen.add(tuple(rows))
    assert counts == [[9]] * 20 and len(seen) > 15
    assert set(sum(map(list, seen), [])) == set(range(9))


def joined(rank, visible=None, cuda=True, egl=(), gpus=8, **environment):
    """join_ranks on a machine with GPUs, which EGL counts as in `egl`, as far as it can be told
    without one -> (args, environment, what torch was told)."""
    told = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": rank + 4, "LOCAL_RANK": rank, "WORLD_SIZE": 8}.items():
            patch.setenv(name, str(value))
        for name in ("CUDA_VISIBLE_DEVICES", "MUJOCO_EGL_DEVICE_ID"):
            patch.setenv(name, "")     # so that what join_ranks sets is taken back
            patch.delenv(name)
        if visible is not None:
            patch.setenv("CUDA_VISIBLE_DEVICES", visible)
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(torch.cuda, "device_count", lambda: gpus)
        patch.setattr(torch.backends.cuda, "matmul", SimpleNamespace())
        patch.setattr(ranks, "egl_devices", lambda: list(egl))
        patch.setattr(ranks.dist, "init_process_group", lambda kind, timeout: told.append(
            (kind, timeout.total_seconds())))
        patch.setattr(ranks.dist, "get_rank", lambda: 0)   # its stdout stays
        patch.setattr(torch.cuda, "set_device", told.append)
        args = SimpleNamespace(device="cuda" if cuda else "cpu", out="a/folder")
        ranks.join_ranks(args)
        return args, {name: os.environ.get(name) for name in (
            "CUDA_VISIBLE_DEVICES", "MUJOCO_EGL_DEVICE_ID")}, told


# what is visible, EGL's devices as CUDA counts them -> what a simulator of rank 2 sees and draws on
GPUS = [(None, (), "2", None), ("", (0, 1, 2, 3), "2", "2"), ("5,3,7,1", (-1, 7, 5), "7", "1"),
        ("5,3,7,1", (0, 1), "7", None), ("GPU-a,GPU-b,GPU-c", (0, 1, 2), "GPU-c", None)]


@pytest.mark.parametrize("visible, egl, own, draws", GPUS)
def test_a_rank_has_a_gpu_of_its_own_and_so_have_its_simulators(visible, egl, own, draws):
    check_gpu_of_its_own(visible, egl, own, draws)


def check_gpu_of_its_own(visible, egl, own, draws):
    args, environment, told = joined(2, visible, egl=egl)
    assert args.device == "cuda:2" and args.out == "a/folder"
    assert environment == {"CUDA_VISIBLE_DEVICES": own, "MUJOCO_EGL_DEVICE_ID": draws}
    (kind, timeout), device = told
    assert kind == "cpu:gloo,cuda:nccl" and timeout >= 3600 and device == 2


def test_who_says_where_to_draw_is_heard():
    _, environment, _ = joined(2, egl=(0, 1, 2), MUJOCO_EGL_DEVICE_ID="5")
    assert environment["MUJOCO_EGL_DEVICE_ID"] == "5"


def test_a_rank_without_a_gpu_is_one_line():
    with pytest.raises(SystemExit) as stopped:
        joined(2, gpus=2)
    assert "--nproc-per-node" in str(stopped.value) and "\n" not in str(stopped.value)


def test_ranks_without_gpus_meet_over_gloo():
    args, environment, told = joined(1, cuda=False, gpus=0)
    assert args.device == "cpu" and not any(environment.values()) and len(told) == 1
    assert told[0][0] == "gloo"


# ------------------------------------------------------------------------------------------------
# Two ranks that are processes: a whole run of 04 on the toy world, and the pieces


def toy_policy():
    torch.manual_seed(1)
    return flow.FlowPolicy(2, 2, state_dim=3, width=16)


def recorded_rows(rows):
    """What an SDE rollout of the toy policy would have recorded in that many chunks."""
    torch.manual_seed(5)
    policy, obs = toy_policy(), {"state": torch.randn(rows, 3)}
    with torch.no_grad():
        actions, record = nft.explore(policy, 4, 0.5)(obs)
    return {**obs, **record, "k": torch.arange(rows) % 4,
            "mask": torch.arange(2) < 1 + torch.arange(rows)[:, None] % 2,
            "y": torch.where(torch.arange(rows) % 3 > 0, 1.0, -1.0),
            "episode": torch.arange(rows) // 3}


def vector(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def updated(batch):
    """A policy after three whole-batch steps of SGD, from a fixed start. Frozen parameters have no
    gradient to average."""
    policy = toy_policy()
    policy.frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    ranks.average_gradients(policy)
    nft.update(policy, torch.optim.SGD(policy.parameters(), lr=0.5), batch, epochs=3,
               minibatch=100)
    return vector(policy)


def learned(rank):
    """A policy after iterations whose ranks have 9 and 4 rows, then 3 and 8: minibatches of 2."""
    from toy_robot import robot
    policy = toy_policy()
    ranks.average_gradients(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    args = SimpleNamespace(num_steps=4, transitions="one", epochs=2, minibatch=2, target="next",
                           beta=1.0, max_drift=0.5, dpo_beta=1.0, device="cpu")
    torch.manual_seed(rank)
    for rows in ((9, 4), (3, 8)):
        batch = recorded_rows(rows[rank])
        batch["y"] = nft.labels(np.arange(5) < 1 + rank, batch["episode"])
        torch.manual_seed(10 + rank)
        robot.update(policy, optimizer, batch, args)
    return vector(policy)


def played(rank):
    """Five episodes, two or three of them here: successes, and the episodes of the rows."""
    success, rows = ranks.shared(Counting(), "cpu").play(None, np.array([2, 3, 5, 4, 7]))
    return {"success": torch.from_numpy(success), "episode": rows["episode"]}


def one_of_two_ranks(rank, port, folder):
    for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=port).items():
        os.environ[name] = str(value)
    torch.set_num_threads(1)
    own = folder / f"own{rank}"                     # where this rank stands
    own.mkdir()
    os.chdir(own)
    os.dup2(os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY), 1)
    from toy_robot import TOY, dress, robot
    told, clone, update, count = {}, robot.clone, robot.update, robot.run.count

    def clone_and_tell(args):
        sft = clone(args)
        told.update(sft=vector(sft), still=args.out == folder / "run")
        return sft

    def update_and_tell(policy, *rest):
        info = update(policy, *rest)
        told["policy"] = vector(policy)
        told.setdefault("draws", torch.rand(4))     # the stream of a rank is its own
        return info

    def count_and_tell(args, state, *rest):
        row = count(args, state, *rest)
        told["env_steps"] = state["env_steps"]
        return row

    with pytest.MonkeyPatch.context() as patch:
        dress(patch)
        patch.setattr(robot, "clone", clone_and_tell)
        patch.setattr(robot.run, "count", count_and_tell)
        patch.setattr(sys, "argv", ["04_train_libero.py", *TOY, "--out", str(folder / "run")])
        robot.main(update=update_and_tell)          # joins the ranks, and the whole run with them
    sys.stdout.flush()
    batch = recorded_rows(12)
    told["updated"] = updated(flow.take(batch, slice(6 * rank, 6 * rank + 6)))
    told["learned"] = learned(rank)
    told["shared"] = torch.tensor(ranks.share(range(7)))
    told["gathered"] = ranks.gather(told["shared"])
    told["arrays"] = torch.from_numpy(ranks.gather(np.array([rank == 0])))
    told["rows"] = torch.tensor([len(part) for part in ranks.minibatches(5 + 3 * rank, 2)])
    told.update(played(rank))
    told["left"] = [str(path) for path in Path().rglob("*")]
    torch.save(told, folder / f"{rank}.pt")


def run_two_ranks(folder):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # a process that imports for both of them
    torch.multiprocessing.set_forkserver_preload(["test_tools_ranks", "toy_robot", "torch._dynamo"])
    torch.multiprocessing.start_processes(one_of_two_ranks, (port, folder), nprocs=2,
                                          start_method="forkserver")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """-> what each of two ranks told, and the folder."""
    folder = made_once(tmp_path_factory, "two_ranks", run_two_ranks)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)], folder


def test_ranks_with_equal_rows_update_like_one_with_the_joined_batch(two):
    alone = updated(recorded_rows(12))
    assert (alone[:-3] - vector(toy_policy())).abs().max() > 1e-3
    for told in two[0]:
        torch.testing.assert_close(told["updated"], alone, rtol=1e-4, atol=1e-6)


def test_ranks_stay_equal_after_updates_with_unequal_rows(two):
    first, second = two[0]
    assert (first["learned"] - vector(toy_policy())).abs().max() > 1e-2
    for name in ("learned", "sft", "policy"):
        assert torch.equal(first[name], second[name])
    assert not torch.equal(first["sft"], first["policy"])
    assert first["env_steps"] == second["env_steps"]
    assert not torch.equal(first["draws"], second["draws"])


def test_ranks_share_and_gather(two):
    first, second = two[0]
    assert first["shared"].tolist() == [0, 1, 2, 3] and second["shared"].tolist() == [4, 5, 6]
    for told in (first, second):
        assert told["gathered"].tolist() == [*range(7)]
        assert told["arrays"].tolist() == [True, False]
        assert told["rows"].tolist() == [2, 2, 1]               # five rows, as the first has
        assert told["success"].tolist() == [False, True, True, False, True]
    assert first["episode"].tolist() == [0, 1, 1, 2, 2]
    assert second["episode"].tolist() == [3, 4, 4]


def test_only_rank_0_prints_and_writes(two):
    from toy_robot import log_of, table
    told, folder = two
    first, second = ((folder / f"{rank}.txt").read_text() for rank in range(2))
    assert first.count("RESULT") == 1 and second == ""
    assert told[1]["left"] == [] and told[0]["still"] and not told[1]["still"]
    assert [row["episodes"] for row in log_of(folder / "run")] == ["16", "32", "48"]
    rows = table(folder / "run" / "test.csv")
    assert [row["episodes"] for row in rows] == ["5", "5", "10", "10"]
    told = first.strip().splitlines()[-1].split()
    assert f"env_steps={log_of(folder / 'run')[-1]['env_steps']}" in told
