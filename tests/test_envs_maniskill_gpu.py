"""envs/maniskill_gpu.py with PhysX on the CPU: one scene, three stacked and a run of 05 against the
simulators of envs/maniskill.py; what is asked of a GPU is asked of stand-ins."""

import importlib
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

from conftest import run_main, wrong_call
from envs import maniskill as mani, maniskill_gpu, workers
from envs.workers import ChunkEnv, tokens
from results import common
from tools import files, ranks

sim = pytest.mark.sim
compare = importlib.import_module("05_train_maniskill")

# ------------------------------------------------------------------------------------------------
# What it cannot play, and what plays it


@pytest.mark.parametrize("flags, word", [
    ("--task PutOnPad-v1", "--task PutOnPad-v1"), ("--obs rgb", "--obs rgb"),
    ("--video 2", "--video"), ("--eval-ood", "--eval-ood"), ("--device cpu", "--device cpu"),
    ("--task PixelGap", "--sim"), ("--task PickCub-v1", "PickCub-v1")])
def test_what_the_gpu_does_not_play_is_told_in_one_line(flags, word):
    line = wrong_call("05_train_maniskill.py", "--sim", "gpu", *flags.split())
    assert word in line and ("--sim" in line or "PickCub" in line)


def run_of(**changes):
    return SimpleNamespace(**{"task": "PickCube-v1", "obs": "state", "video": 0, "eval_ood": False,
                              "sim": "gpu", "device": "cuda", **changes})


@sim
def test_physx_that_cannot_use_a_gpu_is_told_in_one_line(monkeypatch):
    from sapien import physx
    called = []

    def fails():
        called.append("gpu")
        raise ConnectionError("no route\nto the release page")

    monkeypatch.setattr(physx, "enable_gpu", fails)
    with pytest.raises(SystemExit) as told:
        mani.check_run(run_of())
    line = str(told.value)
    assert "--sim gpu" in line and "no route" in line and "\n" not in line and ".sapien" in line
    monkeypatch.setattr(physx, "enable_gpu", lambda: called.append("works"))
    assert mani.check_run(run_of()) is None and called == ["gpu", "works"]
    mani.check_run(run_of(sim="cpu", device="cpu", task="PutOnPad-v1", video=3, eval_ood=True))


def test_each_rank_has_a_scene_for_each_of_its_episodes_and_demos_stay_with_the_processes(
        monkeypatch):
    monkeypatch.setattr(maniskill_gpu, "make_scenes", lambda *told: told)
    monkeypatch.setattr(mani, "make_workers", lambda *told, **more: (told, more["demo_noise"]))
    args = run_of(episodes=48, max_steps=24, num_envs=4, horizon=4, renderer=None)
    assert compare.make_world(args) == ("PickCube-v1", 48, 24, "cuda")
    assert compare.make_world(args, demo_noise=0.0) == (("PickCube-v1", 4), 0.0)
    monkeypatch.setattr(ranks, "rank_of", lambda: (1, 3))
    args.device = "cuda:1"
    assert compare.make_world(args) == ("PickCube-v1", 16, 24, "cuda:1")


def test_workers_ask_whatever_they_are_given():
    """Something without processes: its own errors are its own."""
    asked = []

    class Broken:
        def reset(self, **told):
            asked.append(told)

        def close(self):
            asked.append("close")

    broken = Broken()
    world = workers.Workers(None, 7, envs=broken)
    assert world.envs is broken and world.num_envs == 7 and asked == [{}]
    for error in (EOFError, BrokenPipeError):
        with pytest.raises(error):
            world.ask([-1], [], lambda: (_ for _ in ()).throw(error))
    world.close()
    assert asked[-1] == "close"


@pytest.fixture
def products():
    """Where torch keeps how CUDA multiplies matrices of float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.allow_tf32 = before


def test_a_gpu_run_multiplies_on_tensor_cores_and_a_cpu_run_does_not(products):
    ranks.join_ranks(SimpleNamespace(device="cpu"))
    assert not products.allow_tf32
    ranks.join_ranks(SimpleNamespace(device="cuda"))
    assert products.allow_tf32


# ------------------------------------------------------------------------------------------------
# One scene, and the simulators of the CPU


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    """A simulator of Workers lives here: it plays the same, and no process has to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "processes", lambda make_env, count: gym.vector.SyncVectorEnv(
            [make_env] * count, autoreset_mode=gym.vector.AutoresetMode.DISABLED))
        yield


SEEDS = list(range(100, 112))


def act_of(skill):
    """An `act` with two actions a chunk: the expert's, by what a scene sees of itself, and that
    half as far, turned a little by a number that its start gives."""
    def act(obs):
        chunks = []
        for row in obs["state"].numpy():
            action = mani.expert(skill, row[4] > 0, row[5:8], row[8:11])
            astray = np.float32([0.5, 0.5 + np.sin(1e3 * row[0]), 0.5, 1])
            chunks.append([action, astray * action])
        return torch.from_numpy(np.float32(chunks)), {"mark": obs["state"].sum(1)}
    return act


def scene(task="PickCube-v1", max_steps=18):
    return maniskill_gpu.make_scenes(task, 1, max_steps, "cpu")


def by_episode(rows):
    order = torch.argsort(rows["episode"], stable=True)
    return {name: values[order] for name, values in rows.items()}


def same_play(played, wanted):
    """The same outcomes and, episode by episode, the same rows, to the last bit."""
    (success, rows), (expected, others) = played, wanted
    assert success.tolist() == expected.tolist() and rows.keys() == others.keys()
    for name, values in by_episode(rows).items():
        other = by_episode(others)[name]
        assert values.dtype == other.dtype and torch.equal(values, other), name


@pytest.fixture(scope="module")
def wanted():
    """What a simulator plays of twelve episodes of PickCube."""
    world = mani.make_workers("PickCube-v1", 1, horizon=2, max_steps=18)
    yield world.play(act_of("hold"), SEEDS)
    world.close()


@sim
def test_one_scene_plays_what_a_simulator_plays(wanted):
    """Outcomes, executed actions and every state, to the last bit."""
    assert 2 < wanted[0].sum() < 10                              # successes and failures
    world = scene()
    same_play(world.play(act_of("hold"), SEEDS), wanted)
    assert world.play(act_of("hold"), [])[1] == {}
    world.close()


def alone(scenes):
    """The scene's physics as ManiSkillSim has it, whose episodes leave no trace."""
    reset = scenes.reset

    def traceless(seed, options):
        mani.ManiSkillSim.fresh_physics(SimpleNamespace(env=scenes.env, renderer=None))
        obs = reset(seed=seed, options=options)
        for actor in scenes.env.scene.actors.values():
            if actor.px_body_type == "dynamic":
                actor._bodies[0].wake_up()
        return obs

    scenes.reset = traceless


@sim
@pytest.mark.parametrize("task", [task for task in mani.TASKS if task != "PutOnPad-v1"])
def test_every_tasks_observations_are_those_of_its_simulator(task):
    """Episode by episode against ChunkEnv: the expert's, of PickCube's, which grasps in every task,
    and one without motion."""
    simulator, world = mani.ManiSkillSim(task), scene(task, mani.TASKS[task].max_steps)
    env = ChunkEnv(lambda: simulator, gym.spaces.Dict(), 4, mani.TASKS[task].max_steps, 2)
    alone(world.envs)
    own = mani.TASKS[task].skill
    for seed, skill in ((300, own), (301, "hold"), (302, None)):
        obs, _ = world.envs.reset(seed=[seed], options={"reset_mask": np.array([True])})
        mine, _ = env.reset(seed=seed)
        over, held = False, False
        while not over:
            assert np.array_equal(obs["state"][0], mine["state"]) and mine["state"].shape == (11,)
            assert np.array_equal(obs["tokens"][0], mine["tokens"]) and obs["tokens"][0, 0] == 32
            chunk = act_of(skill or own)(obs)[0][:, :1].numpy() * (skill is not None)
            obs, reward, terminated, truncated, info = world.envs.step(chunk)
            mine, *scalars, told = env.step(chunk[0])
            assert [reward[0], terminated[0], truncated[0]] == scalars
            assert {name: values[0] for name, values in info.items()} == told
            over, held = terminated[0] or truncated[0], held or obs["state"][0, 4] == 1
        if skill != "hold" or own == "hold":
            assert terminated[0] == (skill is not None)
        assert held == (skill is not None and own != "push")
    world.close()
    simulator.close()


@sim
def test_a_reset_forgets_what_the_hand_held_and_leaves_the_random_stream_alone():
    world = scene()
    scenes, act = world.envs, act_of("hold")
    obs, _ = scenes.reset(seed=[100], options={"reset_mask": np.array([True])})
    while not obs["state"][0, 4]:
        obs, *_ = scenes.step(act(obs)[0].numpy())
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    obs, _ = scenes.reset(seed=[101], options={"reset_mask": np.array([True])})
    assert torch.equal(torch.rand(2), wanted)
    assert scenes.env.agent.is_grasping(scenes.env.cube)      # PhysX still tells the old contacts
    assert obs["state"][0, 4] == 0
    world.close()


@sim
def test_the_inverse_kinematics_multiply_exactly_whatever_the_policy_does(monkeypatch, products):
    world, products.allow_tf32 = scene(), True
    scenes, step, seen = world.envs, world.envs.env._step_action, []
    monkeypatch.setattr(scenes.env, "_step_action",
                        lambda actions: (seen.append(products.allow_tf32), step(actions)))
    scenes.reset(seed=[100], options={"reset_mask": np.array([True])})
    scenes.step(np.zeros((1, 3, 4), np.float32))
    assert seen == [False] * 3 and products.allow_tf32
    world.close()


# ------------------------------------------------------------------------------------------------
# Several scenes


class Stack:
    """Things of several scenes as one: what is read of it is read of each, tensors one below the
    other; a call goes to each with its own part of every tensor and Stack."""

    def __init__(self, parts):
        self.parts = parts

    def __getattr__(self, name):
        return stacked([getattr(part, name) for part in self.parts])

    def __call__(self, *told):
        def own(value, i):
            if isinstance(value, Stack):
                return value.parts[i]
            return value[i:i + 1] if torch.is_tensor(value) else value

        return stacked([part(*(own(value, i) for value in told))
                        for i, part in enumerate(self.parts)])


def stacked(values):
    if torch.is_tensor(values[0]):
        return torch.cat(values)
    if isinstance(values[0], dict):
        return {name: stacked([value[name] for value in values]) for name in values[0]}
    return Stack(values)


class StackedEnv(Stack):
    """ManiSkill's envs of one scene each as its one env of many: what sets something sets it in the
    scenes of the reset mask alone, and the length of env_idx says for how many numbers are drawn.
    """

    device = torch.device("cpu")

    def __init__(self, envs):
        super().__init__(envs)
        self.scene = SimpleNamespace(gpu_sim_enabled=False, _reset_mask=None)
        self.close = lambda: [env.close() for env in envs]

    def masked(self):
        mask = self.scene._reset_mask
        assert mask.dtype == torch.bool and len(mask) == len(self.parts)
        return [env for env, fresh in zip(self.parts, mask) if fresh]

    def _clear_sim_state(self):
        for env in self.masked():
            env._clear_sim_state()

    def _initialize_episode(self, env_idx, options):
        env, = self.masked()
        assert env is self.parts[env_idx]
        env._episode_rng = self._episode_rng
        env._initialize_episode(torch.tensor([0]), options)


@pytest.fixture
def three(monkeypatch):
    """Workers on three scenes."""
    make, asked = gym.make, []

    def stack(task, num_envs, **more):
        asked.append((num_envs, more.pop("sim_backend")))
        envs = [make(task, num_envs=1, sim_backend="physx_cpu", **more).unwrapped
                for _ in range(num_envs)]
        return SimpleNamespace(unwrapped=StackedEnv(envs))

    monkeypatch.setattr(gym, "make", stack)
    world = maniskill_gpu.make_scenes("PickCube-v1", 3, 18, "cuda:1")
    assert asked == [(3, "physx_cuda:1")]
    monkeypatch.setattr(gym, "make", make)
    yield world
    world.close()


def states(scenes):
    return torch.cat([env.get_state() for env in scenes.env.parts])


@sim
def test_three_scenes_play_what_a_simulator_plays(three, wanted):
    """Twelve episodes, whose ends differ, in scenes that take the next one at once."""
    same_play(three.play(act_of("hold"), SEEDS), wanted)


@sim
def test_a_seed_is_the_same_episode_in_every_scene(three):
    success, rows = three.play(act_of("hold"), [104, 104, 104])
    parts = [{name: values[rows["episode"] == e] for name, values in rows.items()
              if name != "episode"} for e in range(3)]
    for part in parts[1:]:
        assert all(torch.equal(part[name], values) for name, values in parts[0].items())
    assert len(set(success)) == 1 and len(parts[0]["state"]) > 4


@sim
def test_a_reset_leaves_other_scenes_as_they_are(three):
    scenes = three.envs
    scenes.reset(seed=[7, 8, 9], options={"reset_mask": np.ones(3, bool)})
    for _ in range(2):
        scenes.step(np.full((3, 2, 4), 0.3, np.float32))
    before, seen = states(scenes), scenes.observe()["state"]
    obs, _ = scenes.reset(seed=[0, 11, 0], options={"reset_mask": np.array([False, True, False])})
    moved = (states(scenes) != before).any(1)
    assert moved.tolist() == [False, True, False] and scenes.steps.tolist() == [4, 0, 4]
    assert torch.equal(obs["state"][[0, 2]], seen[[0, 2]])
    again, _ = scenes.reset(seed=[11, 0, 11], options={"reset_mask": np.array([True, False, True])})
    assert torch.equal(again["state"][0], obs["state"][1])
    assert torch.equal(again["state"][0], again["state"][2])


@sim
def test_a_scene_whose_episode_is_over_waits(three):
    """Its chunk ends at the time limit, later chunks execute nothing, and when all are over the
    physics rests."""
    scenes, calls = three.envs, []
    step = scenes.env._step_action
    scenes.env._step_action = lambda actions: (calls.append(actions.clone()), step(actions))
    before, _ = scenes.reset()
    assert before["state"].shape == (3, 11)                 # idle scenes show something
    assert torch.equal(before["tokens"], torch.tensor(tokens("")).expand(3, -1))
    scenes.reset(seed=[7, 8, 9], options={"reset_mask": np.ones(3, bool)})
    scenes.steps[1] = 16                                                            # of 18
    chunk = np.full((3, 4, 4), 2.0, np.float32)
    *_, truncated, info = scenes.step(chunk)
    assert info["executed"].tolist() == [4, 2, 4] and truncated.tolist() == [False, True, False]
    assert not info["success"].any() and len(calls) == 4
    assert calls[1].tolist() == [[1.0] * 4] * 3                   # clipped
    assert calls[2].tolist() == [[1.0] * 4, [0.0] * 4, [1.0] * 4]
    *_, info = scenes.step(chunk)
    assert info["executed"].tolist() == [4, 0, 4]
    scenes.steps[[0, 2]] = 17
    scenes.step(chunk)
    assert len(calls) == 9
    scenes.step(chunk)
    assert len(calls) == 9


# ------------------------------------------------------------------------------------------------
# 05


@sim
def test_a_run_of_05_in_a_scene_is_the_run_in_a_simulator(tmp_path, monkeypatch):
    """Every number of log.csv and test.csv, and every weight. --eval-only may go back to
    --sim cpu."""
    few = ("--num-demos 2 --sft-steps 20 --episodes 8 --num-envs 1 --eval-episodes 2 "
           "--test-episodes 2 --max-steps 12 --device cpu").split()
    make = maniskill_gpu.make_scenes
    monkeypatch.setattr(maniskill_gpu, "make_scenes", lambda task, count, max_steps, device: make(
        task, 1, max_steps, device))                             # eight are for a GPU
    monkeypatch.setattr(mani, "check_run", lambda args: None)
    for name in ("cpu", "gpu"):
        code, out, err = run_main("05_train_maniskill.py", *few, "--iterations", 1, "--sim", name,
                                  "--out", tmp_path / name)
        assert code is None and "RESULT" in out, err
    told = [[{k: v for k, v in row.items() if "seconds" not in k}
             for file in ("log", "test") for row in common.read(tmp_path / name / f"{file}.csv")]
            for name in ("cpu", "gpu")]
    assert told[0] == told[1] and len(told[0]) == 3
    content = [files.load(tmp_path / name / "last.pt") for name in ("cpu", "gpu")]
    assert [part["flags"]["sim"] for part in content] == ["cpu", "gpu"]
    assert all(torch.equal(values, content[1]["policy"][key])
               for key, values in content[0]["policy"].items())
    code, out, _ = run_main("05_train_maniskill.py", "--eval-only", tmp_path / "gpu" / "last.pt",
                            "--sim", "cpu", "--device", "cpu", "--num-envs", 1,
                            "--out", tmp_path / "again")
    assert code is None and float(out.split("success=")[-1].split()[0]) == float(
        told[1][-1]["success"])
    assert "sapien" in sys.modules
