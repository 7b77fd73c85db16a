"""envs/maniskill.py on the real simulator: physics equal to ManiSkill's own, episodes that do not
leak, experts, the language task, every OOD variant, images, and worker processes."""

import multiprocessing
import os
import signal

import gymnasium as gym
import numpy as np
import pytest
import torch

import conftest  # noqa: F401  (the way to envs)
from envs import maniskill as mani, pad_words
from envs.workers import ChunkEnv, tokens

sim = pytest.mark.sim


@pytest.fixture(scope="module")
def pick():
    return mani.ManiSkillSim("PickCube-v1")


@pytest.fixture(scope="module")
def pads():
    return mani.ManiSkillSim("PutOnPad-v1")


def episode(simulator, seed, actions):
    """The states and successes of one episode under fixed actions."""
    simulator.reset(seed)
    states, success = [simulator.env.get_state().numpy().copy()], []
    for action in actions:
        success.append(simulator.advance(action))
        states.append(simulator.env.get_state().numpy().copy())
    return np.concatenate(states), success


def solve(simulator, seed, steps=40):
    """The scripted controller for at most that many steps -> (its actions, success)."""
    simulator.reset(seed)
    actions = []
    while len(actions) < steps:
        actions.append(simulator.expert())
        if simulator.advance(actions[-1]):
            return actions, True
    return actions, False


def seen(simulator, seed):
    simulator.reset(seed)
    return simulator.observe()["state"]


def grasp(simulator, seed):
    """The state at the moment in which the expert holds the thing."""
    state = seen(simulator, seed)
    while not state[4]:
        simulator.advance(simulator.expert())
        state = simulator.observe()["state"]
    return state


def test_importing_loads_no_simulator(loaded_by_imports):
    assert not {"mani_skill", "sapien"} & loaded_by_imports


def told_of_workers(*args, **more):
    """What make_workers tells Workers -> (simulator, its keywords, one environment, name)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mani, "Workers", lambda *told, **named: (*told, named))
        make_env, num_envs, named = mani.make_workers(*args, **more)
    assert num_envs == 3
    env = make_env()
    return env.make_sim.args, env.make_sim.keywords, env, named["name"]


def test_the_workers_of_a_run_are_told_what_they_will_see():
    """Demos with noise have twice the time; a renderer where something is drawn."""
    state, plain, env, name = told_of_workers("PushCube-v1", 3, horizon=5, renderer="cuda")
    assert state == ("PushCube-v1", "state", None) and plain == {"demo_noise": None}
    assert env.max_steps == mani.TASKS["PushCube-v1"].max_steps and env.film is None
    assert env.action_space.shape == (5, 4) and name(7) == "episode 7 of PushCube-v1"
    assert {name: box.shape for name, box in env.observation_space.items()} == {
        "state": (11,), "tokens": (128,)}
    _, noisy, env, _ = told_of_workers("PushCube-v1", 3, max_steps=9, demo_noise=0.1)
    assert env.max_steps == 18 and noisy == {"demo_noise": 0.1}
    assert env.observation_space["action"].shape == (4,)
    _, clean, env, _ = told_of_workers("PushCube-v1", 3, max_steps=9, demo_noise=0.0)
    assert env.max_steps == 9 and clean == {"demo_noise": 0.0}
    assert env.observation_space["action"].shape == (4,)
    seen, _, env, _ = told_of_workers("PutOnPad-v1", 3, obs="rgb", renderer="cuda")
    assert seen == ("PutOnPad-v1", "rgb", "cuda")
    assert env.observation_space["rgb"].shape == (1, 3, 128, 128)
    assert env.observation_space["state"].shape == (5,)
    filmed, _, env, _ = told_of_workers("PutOnPad-v1", 3, renderer="cuda", film="a/folder")
    assert filmed == ("PutOnPad-v1", "state", "cuda") and env.film == "a/folder"
    assert env.observation_space.keys() == {"state", "tokens"}
    assert env.observation_space["state"].shape == (32,)


# ------------------------------------------------------------------------------------------------
# Physics and episodes


@sim
def test_physics_equals_env_step_to_the_last_bit(pick):
    """A whole grasp and random actions, some out of range, against ManiSkill's own step."""
    official = gym.make("PickCube-v1", num_envs=1, sim_backend="physx_cpu", render_backend="none",
                        obs_mode="state", control_mode="pd_ee_delta_pos").unwrapped
    random = np.random.default_rng(0).uniform(-1.5, 1.5, (20, 4)).astype(np.float32)
    for seed, actions in ((7, solve(pick, 7)[0]), (8, list(random))):
        states, success = episode(pick, seed, actions)
        official.reset(seed=seed, options={"reconfigure": True})
        expected = [official.get_state().numpy().copy()]
        for action in actions:
            *_, info = official.step(torch.from_numpy(np.clip(action, -1, 1))[None])
            expected.append(official.get_state().numpy().copy())
        assert np.array_equal(states, np.concatenate(expected))
        assert success[-1] == bool(info["success"]) == (seed == 7)


@sim
@pytest.mark.parametrize("task", ["pick", "pads"])
def test_an_episode_does_not_depend_on_the_one_before(task, request):
    simulator = request.getfixturevalue(task)
    actions = solve(simulator, 11)[0]
    first = episode(simulator, 11, actions)[0]
    for other in (12, 13, 14):
        held = [state[4] for state in (grasp(simulator, other), seen(simulator, 11))]
        assert held == [1, 0]
        assert np.array_equal(episode(simulator, 11, actions)[0], first)
        episode(simulator, other, np.zeros((3, 4)))     # things that have begun to rest
        assert np.array_equal(episode(simulator, 11, actions)[0], first)
    assert not np.array_equal(episode(simulator, 12, actions)[0], first)


@sim
def test_things_forget_how_long_they_have_rested(pads):
    """Two pairs of episodes, of 180 that were tried, in which they would remember."""
    for seed, before in ((6, 163), (22, 323)):
        actions = solve(pads, seed, 25)[0]
        first = episode(pads, seed, actions)[0]
        solve(pads, before, 25)
        assert np.array_equal(episode(pads, seed, actions)[0], first)


@sim
@pytest.mark.parametrize("task", list(mani.TASKS))
def test_the_expert_solves_unseen_episodes(task):
    """Eight of eight; and the observation is what its docstring says, from ManiSkill's poses."""
    simulator = mani.ManiSkillSim(task)
    solved = [solve(simulator, 300 + s, mani.TASKS[task].max_steps)[1] for s in range(8)]
    assert np.mean(solved) == 1
    obs, env = simulator.observe(), simulator.env
    assert obs["state"].shape == (mani.state_size(task, "state"),)
    assert {k: v.dtype for k, v in obs.items()} == {"state": np.float32, "tokens": np.uint8}
    hand, fingers = env.agent.tcp.pose.p[0].numpy(), env.agent.robot.get_qpos()[0, 7:]
    held = {"hold": 1, "place": 0, "push": 0}[mani.TASKS[task].skill]  # once it is solved
    assert np.allclose(obs["state"][:5], [*hand, fingers.sum(), held], atol=1e-6)
    if not mani.slots(task):
        thing = mani.TASKS[task].objects(env)[0].pose.p[0].numpy()
        assert np.allclose(obs["state"][5:8], thing - hand, atol=1e-6)
        assert np.array_equal(obs["tokens"], tokens(""))
        assert np.linalg.norm((obs["state"][5:8] - obs["state"][8:])[:2]) < 0.1
    simulator.close()


@sim
def test_a_demo_executes_the_expert_with_noise_and_observes_it_without():
    noisy = mani.ManiSkillSim("PickCube-v1", demo_noise=0.5)
    plain = mani.ManiSkillSim("PickCube-v1")
    noisy.reset(5)
    action = noisy.observe()["action"]
    assert np.array_equal(action, noisy.expert()) and action.dtype == np.float32
    rng = np.random.default_rng(5)
    executed = [0.2 + 0.5 * rng.standard_normal(4) * [1, 1, 1, 0] for _ in range(6)]
    assert np.array_equal(episode(noisy, 5, np.full((6, 4), 0.2))[0],
                          episode(plain, 5, executed)[0])


# ------------------------------------------------------------------------------------------------
# PutOnPad


def words(obs):
    return obs["tokens"].tobytes().decode().split()


@sim
def test_the_instruction_names_the_thing_and_the_pad_that_count(pads):
    """The offsets of a slot are those of the actor with that name; the others' are zero; and the
    only success is the named thing on the named pad: any other thing or pad is none."""
    from mani_skill.utils.structs.pose import Pose
    for seed in range(6):
        pads.reset(seed)
        env, obs = pads.env, pads.observe()
        told = words(obs)
        slots = [a.name for a in env.things] + [a.name for a in env.pads]
        offsets = obs["state"][5:].reshape(9, 3)
        thing, pad = f"{told[2]} {told[3]}", f"{told[6]} pad"
        assert (slots.index(thing), slots.index(pad) - 6) in pad_words.TRAINED
        shown = [name for name, offset in zip(slots, offsets) if offset.any()]
        assert {thing, pad} < set(shown) and len(shown) == 4
        actors = {a.name: a for a in [*env.things, *env.pads]}
        for name in shown:
            where = (actors[name].pose.p - env.agent.tcp_pos)[0, :2].numpy()
            assert np.allclose(offsets[slots.index(name), :2], where, atol=1e-6)
        for name in shown:              # put every thing on every pad, by hand
            for goal in shown:
                if name.endswith("pad") or not goal.endswith("pad"):
                    continue
                before = actors[name].pose
                place = actors[goal].pose.p + torch.tensor([0, 0, 0.019])
                actors[name].set_pose(Pose.create_from_pq(place, before.q))
                assert bool(env.evaluate()["success"]) == ((name, goal) == (thing, pad))
                actors[name].set_pose(before)


@sim
def test_success_needs_an_open_hand_and_a_thing_at_rest(pads):
    actions, ok = solve(pads, 5)
    assert ok and not episode(pads, 5, actions[:-1])[1][-1]
    assert episode(pads, 5, actions)[1][-1]
    thing = pads.env.things[pads.env.target.item()]
    for spoil, amount in ((thing.set_linear_velocity, 0.1), (thing.set_angular_velocity, 1.0)):
        spoil(torch.tensor([amount, 0, 0]))
        assert not bool(pads.env.evaluate()["success"])
        spoil(torch.zeros(3))
        assert bool(pads.env.evaluate()["success"])
    closed = torch.tensor([1.] * 7 + [0] * 2)
    pads.env.agent.robot.set_qpos(pads.env.agent.robot.get_qpos() * closed)
    assert not bool(pads.env.evaluate()["success"])


def test_held_out_combinations_hide_no_colour_shape_or_pair():
    """A policy has met every colour, shape and pad, and every two of them together."""
    def triple(combination):
        thing, pad = combination
        return thing // 2, thing % 2, pad

    every = set(map(triple, pad_words.COMBINATIONS))
    trained, held = set(map(triple, pad_words.TRAINED)), set(map(triple, pad_words.HELD_OUT))
    assert len(held) == 6 and len(trained) == 12 and not held & trained
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert {(c[a], c[b]) for c in trained} == {(c[a], c[b]) for c in every}


# ------------------------------------------------------------------------------------------------
# Out of distribution


@sim
def test_each_variant_changes_what_it_names_and_nothing_else(pads):
    """The same seed with and without a variant: what differs is what its name says."""
    def suite(obs):
        wanted = {axis: {} for axis in ("in-distribution", "vision", "semantic", "execution")}
        for axis, variant, changes in mani.variants("PutOnPad-v1", obs):
            wanted[axis][variant] = changes
        return wanted

    wanted, images = suite("state"), suite("rgb")
    assert [len(v) for v in wanted.values()] == [1, 1, 3, 3]
    assert [len(v) for v in images.values()] == [1, 6, 5, 3]
    assert wanted["in-distribution"] == images["in-distribution"] == {"as in training": {}}
    assert wanted["semantic"].items() < images["semantic"].items()
    assert wanted["execution"] == images["execution"]

    def start(changes, seed=8):
        changed = mani.ManiSkillSim("PutOnPad-v1", changes=changes)
        changed.reset(seed)
        return changed, changed.observe(), changed.env.get_state().numpy()

    pads.reset(8)
    plain, physics = pads.observe(), pads.env.get_state().numpy()
    true = plain["state"][5:].reshape(9, 3)
    for variant, changes in wanted["vision"].items():
        changed, obs, state = start(changes)
        assert np.array_equal(state, physics)                        # it only sees wrongly
        assert np.array_equal(obs["tokens"], plain["tokens"])
        assert np.array_equal(obs["state"][:5], plain["state"][:5])
        error = obs["state"][5:].reshape(9, 3) - true
        again = (changed.observe()["state"][5:].reshape(9, 3) - true)[true.any(1)]
        assert not error[~true.any(1)].any()                         # parked things stay unseen
        error, size = error[true.any(1)], float(variant.split()[2]) / 1000
        assert size / 2 < error.std() < 2 * size and not np.allclose(error, again)

    for variant, changes in images["semantic"].items():
        changed, obs, state = start(changes)
        told, env = " ".join(words(obs)), changed.env
        shown = env.shown[0].tolist()
        pair = env.target.item(), env.goal.item() - 6
        assert (pair in pad_words.HELD_OUT) == ("held-out" in variant)
        assert sum(shown[:6]) == 2 + ("object" in variant)
        assert sum(shown[6:]) == 2 + (variant.endswith("pad"))
        same = told.startswith("put the") and told.endswith(" pad")
        assert same != (variant in ("paraphrase", "pad named first"))
        if not same:
            assert np.array_equal(state, physics)
            assert set(words(plain)) - {"put", "on"} < set(told.replace(",", "").split())

    starts, arm, moved = wanted["execution"].values()
    xs = np.concatenate([start(starts, s)[0].places()[:, 0] for s in range(4)])
    assert (np.abs(xs[xs > -0.5]) > 0.07).all()      # in training within 0.08 of the middle

    def joints(simulator):
        rest = []
        for seed in range(6):
            simulator.reset(seed)
            rest.append(simulator.env.agent.robot.get_qpos()[0, :7])
        return torch.stack(rest).std(0).mean()
    assert 4 < joints(start(arm)[0]) / joints(pads) < 6          # 0.1 rad for ManiSkill's 0.02

    changed = start(moved)[0]
    pads.reset(8)
    jumps = []
    for _ in range(8):
        for simulator in (changed, pads):
            simulator.advance(np.zeros(4))
        jumps.append(np.linalg.norm(changed.places() - pads.places(), axis=-1))
    assert (np.array(jumps[:4]) == 0).all()
    target = changed.env.target.item()
    assert jumps[5][target] == pytest.approx(0.03, abs=0.002)
    assert np.delete(jumps[7], target).max() < 1e-3


@sim
def test_starts_of_pick_cube_outside_the_training_region(pick):
    (changes,) = [c for _, v, c in mani.variants("PickCube-v1", "state") if "starts" in v]
    outside = mani.ManiSkillSim("PickCube-v1", changes=changes)
    for seed in range(5):
        for simulator in (pick, outside):
            simulator.reset(seed)
        assert np.allclose(outside.places()[0] - pick.places()[0], [0, 0.2, 0], atol=1e-6)


# ------------------------------------------------------------------------------------------------
# Images


@pytest.fixture(scope="module")
def renderer():
    before = dict(os.environ)
    try:
        yield mani.find_renderer()
    except SystemExit as missing:
        if os.environ.get("REQUIRE_VULKAN"):
            raise
        pytest.skip(str(missing))
    os.environ.clear()
    os.environ.update(before)


def in_a_fresh_process(function, *args):
    """Vulkan looks for drivers once, and the tests above have started it without one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def picture(simulator, seed):
    simulator.reset(seed)
    obs = simulator.observe()
    assert obs["rgb"].shape == (1, 3, 128, 128) and obs["rgb"].dtype == np.uint8
    assert obs["state"].shape == (mani.state_size("PutOnPad-v1", "rgb"),) == (5,)
    assert obs["tokens"].shape == (128,)
    return obs["rgb"][0].astype(int)


@sim
def test_images_show_the_scene_and_the_variants_change_them(renderer, pads, tmp_path):
    actions = solve(pads, 5)[0][:10]
    states = in_a_fresh_process(check_images, renderer, actions, tmp_path / "films")
    assert np.array_equal(states, episode(pads, 5, actions)[0])  # drawing changes no physics


def colours(simulator):
    """(6, 3): what each thing is painted with."""
    things = simulator.env.things
    return np.array([simulator.materials(thing)[0].base_color[:3] for thing in things])


def check_images(renderer, actions, folder):
    import imageio
    drawn = mani.ManiSkillSim("PutOnPad-v1", obs="rgb", renderer=renderer)
    first = picture(drawn, 3)
    assert np.array_equal(first, picture(drawn, 3))
    assert np.abs(first - picture(drawn, 4)).mean() > 1
    for seed in range(4):   # green and blue are in the picture when such a thing or pad is there
        red, green, blue = picture(drawn, seed)
        shown = drawn.env.shown[0].tolist()
        for k, strong in ((1, green - np.maximum(red, blue)), (2, blue - np.maximum(red, green))):
            there = shown[2 * k] or shown[2 * k + 1] or shown[6 + k]
            assert ((strong > 25).sum() > 20) == there
    pick = mani.ManiSkillSim("PickCube-v1", obs="rgb", renderer=renderer)
    pick.reset(0)                       # its goal, a green ball, is hidden in ManiSkill's images
    red, green, blue = pick.observe()["rgb"][0].astype(int)
    assert (green - np.maximum(red, blue) > 50).sum() > 10
    pick.close()
    states = episode(drawn, 5, actions)[0]
    env = ChunkEnv(lambda: drawn, gym.spaces.Dict(), 4, len(actions), len(actions), film=folder)
    env.reset(seed=5)
    env.step(np.array(actions))
    film, = folder.glob("*.mp4")
    assert film.name == "PutOnPad-v1_5_failure.mp4"
    assert imageio.get_reader(film).count_frames() == len(actions)
    vision = [(v, changes) for axis, v, changes in mani.variants("PutOnPad-v1", "rgb")
              if axis == "vision"]
    assert len(vision) == 6
    for variant, changes in vision:
        if "noise" in variant:
            drawn.changes = changes
            noise = (picture(drawn, 3) - first)[(first > 80) & (first < 175)]  # nothing is clipped
            assert noise.std() == pytest.approx(255 * float(variant.split()[-1]), rel=0.2)
    before = first
    for variant, changes in vision:
        if "noise" not in variant:
            drawn.changes = changes          # one after the other, on top of what was changed
            painted = colours(drawn)
            drawn.apply_changes()
            if "shades" in variant:          # red, green and blue things, and still not alike
                shades = colours(drawn)
                assert (np.abs(shades - painted).max(1) > 0.1).all()
                assert all(np.abs(a - b).max() > 0.1 for i, a in enumerate(shades[::2])
                           for b in shades[2 * i + 2::2])
            after = picture(drawn, 3)
            assert np.abs(after - before).mean() > 0.02, variant
            if "light" in variant:
                assert after.mean() < 0.9 * before.mean()
            before = after
    return states


def test_without_a_driver_one_line_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setenv("VK_ICD_FILENAMES", str(tmp_path / "none.json"))
    with pytest.raises(SystemExit) as error:
        mani.find_renderer()
    line = str(error.value)
    assert "\n" not in line and "--obs rgb" in line and "chromium-common" in line
    assert "VK_ICD_FILENAMES" in line


# ------------------------------------------------------------------------------------------------
# Worker processes


@pytest.mark.parametrize("task, word", [("PickCub-v1", "PickCube-v1"),
                                        ("RollBall-v1", "controller")])
@sim
def test_an_unknown_task_gets_one_line(task, word):
    with pytest.raises(SystemExit) as error:
        mani.check_task(task)
    assert f"--task {task}" in str(error.value) and word in str(error.value)
    assert "\n" not in str(error.value)
    assert mani.check_task("PutOnPad-v1") is None


def forward(obs):
    """A policy that depends on what it sees of its own row alone."""
    pull = torch.nn.functional.pad(torch.tanh(3 * obs["state"][:, 5:8]), (0, 1), value=1.0)
    return pull[:, None].expand(-1, 4, -1), {"first": obs["state"][:, 5]}


@sim
def test_two_workers_play_the_episodes_of_one_and_bring_their_instruction(pads):
    """Against ChunkEnv in this process; then both again under a variant."""
    seeds, played = [3, 4, 6], []
    workers = mani.make_workers("PutOnPad-v1", 2, max_steps=10)
    rename = {"sentence": "move the {thing} onto the {pad} pad"}
    for changes in ({}, rename):
        workers.change(changes=changes)
        success, rows = workers.play(forward, seeds)
        alone = mani.ManiSkillSim("PutOnPad-v1", changes=changes)
        env = ChunkEnv(lambda: alone, workers.envs.single_observation_space, 4, 10, 4)
        for e, seed in enumerate(seeds):
            obs, own, k = env.reset(seed=seed)[0], rows["episode"] == e, 0
            mine = {name: values[own].numpy() for name, values in rows.items()}
            over = False
            while not over:
                for name in ("state", "tokens"):
                    assert np.array_equal(mine[name][k], obs[name])
                chunk = forward({"state": torch.from_numpy(obs["state"])[None]})[0][0].numpy()
                obs, _, terminated, truncated, info = env.step(chunk)
                assert mine["mask"][k].sum() == info["executed"]
                over, k = terminated or truncated, k + 1
            assert k == own.sum() == 3 and success[e] == info["success"]
        played.append(rows["tokens"])
    workers.close()
    assert not torch.equal(*played)


@sim
def test_demos_of_workers_succeed_and_may_take_twice_as_long():
    workers = mani.make_workers("PickCube-v1", 1, horizon=1, demo_noise=0.1)
    success, rows = workers.play(lambda obs: (obs["action"][:, None], {}), [0, 1, 2])
    assert success.all() and rows["action"].shape[1:] == (mani.ACTION_DIM,)
    success, rows = workers.play(lambda obs: (torch.zeros(1, 1, 4), {}), [0])
    workers.close()
    assert not success.any() and len(rows["state"]) == 2 * mani.TASKS["PickCube-v1"].max_steps


@sim
def test_a_killed_process_is_named_with_its_seed_in_one_line():
    workers = mani.make_workers("PickCube-v1", 2)

    def act(obs):
        os.kill(workers.envs.processes[1].pid, signal.SIGKILL)
        workers.envs.processes[1].join()
        return torch.zeros(2, 4, 4), {}

    with pytest.raises(SystemExit) as error:
        workers.play(act, [41, 42])
    line = str(error.value)
    assert "episode 42 of PickCube-v1" in line and "41" not in line and "\n" not in line
