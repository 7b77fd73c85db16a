"""05 on the real simulator: physics equal to ManiSkill's own, episodes that do not leak, the
experts, the language task and the variants of the OOD suite, and whole small runs with resume,
evaluation, images and everything a user can get wrong."""

import csv
import importlib
import multiprocessing
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from conftest import ROOT, one_clear_line, result_line, run_script

mani = importlib.import_module("05_train_maniskill")
flow, nft = mani.flow, mani.nft

TINY = ["--num-demos", "3", "--sft-steps", "40", "--iterations", "1", "--episodes", "8",
        "--num-envs", "2", "--eval-episodes", "4", "--test-episodes", "4", "--eval-every", "1",
        "--device", "cpu"]


@pytest.fixture(scope="module")
def sim():
    return mani.ManiSkillSim("PickCube-v1")


def episode(sim, seed, actions):
    """The states and successes of one episode under fixed actions."""
    sim.reset([seed], [0])
    states, success = [sim.env.get_state().numpy().copy()], []
    for action in actions:
        success.append(bool(sim.advance(action[None])[0]))
        states.append(sim.env.get_state().numpy().copy())
    return np.concatenate(states), success


def solve(sim, seed, steps=40):
    """The scripted controller for at most 40 steps -> (its actions, success)."""
    sim.reset([seed], [0])
    actions = []
    while len(actions) < steps:
        actions.append(sim.expert()[0])
        if sim.advance(actions[-1][None])[0]:
            return actions, True
    return actions, False


def test_the_expert_solves_unseen_episodes(sim):
    lengths = [len(actions) for actions, ok in (solve(sim, s) for s in range(300, 320)) if ok]
    assert len(lengths) == 20 and max(lengths) <= 24


def test_physics_equals_env_step_to_the_last_bit(sim):
    """A whole grasp and random actions, some out of range, against ManiSkill's own step."""
    official = gym.make("PickCube-v1", num_envs=1, sim_backend="physx_cpu", render_backend="none",
                        obs_mode="state", control_mode="pd_ee_delta_pos").unwrapped
    random = np.random.default_rng(0).uniform(-1.5, 1.5, (20, 4)).astype(np.float32)
    for seed, actions in ((7, solve(sim, 7)[0]), (8, list(random))):
        states, success = episode(sim, seed, actions)
        official.reset(seed=seed, options={"reconfigure": True})
        expected = [official.get_state().numpy().copy()]
        for action in actions:
            *_, info = official.step(torch.from_numpy(np.clip(action, -1, 1))[None])
            expected.append(official.get_state().numpy().copy())
        assert np.array_equal(states, np.concatenate(expected))
        assert success[-1] == bool(info["success"])


def test_an_episode_does_not_depend_on_the_one_before(sim):
    actions = solve(sim, 11)[0]
    first = episode(sim, 11, actions)[0]
    for other in (12, 13, 14):
        solve(sim, other)                       # ends with a cube in the hand
        assert np.array_equal(episode(sim, 11, actions)[0], first)
    assert not np.array_equal(episode(sim, 12, actions)[0], first)


def test_the_batched_world_of_the_gpu_path_equals_the_worker_of_the_cpu_path():
    """CudaEnvs and ChunkEnv play the same chunks, here both on the CPU with one simulator."""
    space = gym.spaces.Dict({"state": gym.spaces.Box(-np.inf, np.inf, (11,))})
    one = nft.ChunkEnv(lambda: mani.OneSim("PickCube-v1"), space, 4, 22, 4)
    many = mani.CudaEnvs(lambda: mani.ManiSkillSim("PickCube-v1"), 1, 22)
    rng = np.random.default_rng(1)
    for seed, clever in ((21, True), (22, False)):
        a, b = one.reset(seed=seed)[0], many.reset(seed=[seed])[0]
        over = False
        while not over:
            assert np.array_equal(a["state"], b["state"][0])
            chunk = (many.sim.expert()[:, None] if clever
                     else rng.uniform(-1, 1, (1, 4, 4)).astype(np.float32))
            a, _, *ends_a, info_a = one.step(chunk[0])
            b, _, *ends_b, info_b = many.step(chunk)
            assert [bool(e) for e in ends_a] == [bool(e[0]) for e in ends_b]
            assert (info_a["executed"], info_a["success"]) == (info_b["executed"][0],
                                                               info_b["success"][0])
            over = any(ends_a)
        assert info_a["success"] == clever
        assert one.step(chunk[0])[-1]["executed"] == 0      # nothing happens after the end


def test_validation_test_and_training_never_share_an_episode():
    args = dict(first=mani.TRAIN + 9 * 1_000_000, episodes=256)
    for kind in ("binary", "grouped"):
        assert nft.start_seeds(*args.values(), kind).min() > mani.TEST + 100_000
    assert mani.VALIDATION + 100_000 < mani.TEST and mani.TEST + 100_000 <= mani.OOD
    assert mani.OOD + 100_000 <= mani.TRAIN


def test_a_whole_run_resumes_evaluates_and_keeps_its_results(tmp_path):
    out = tmp_path / "run"
    result = run_script("05_train_maniskill.py", *TINY, "--out", str(out), cwd=tmp_path)
    last = result.stdout.strip().splitlines()[-1]
    fields = dict(pair.split("=") for pair in last.removeprefix("RESULT ").split())
    assert set(fields) == {"task", "sft", "stepnft", "episodes", "env_steps", "seconds"}
    assert fields["task"] == "PickCube-v1" and fields["episodes"] == "8"
    assert 8 <= int(fields["env_steps"]) <= 8 * 24
    assert (out / "learning.png").stat().st_size > 5000
    before = (out / "log.csv").read_text()

    again = run_script("05_train_maniskill.py", *TINY, "--out", out, cwd=tmp_path, ok=False)
    assert "--resume" in one_clear_line(again)
    assert (out / "log.csv").read_text() == before

    more = [*TINY, "--out", str(out), "--resume"]
    more[more.index("--iterations") + 1] = "2"
    result = run_script("05_train_maniskill.py", *more, cwd=tmp_path)
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [r["iteration"] for r in rows] == ["1", "2"]
    assert int(rows[1]["env_steps"]) > int(rows[0]["env_steps"])
    assert all(math.isfinite(float(r["loss"])) for r in rows)

    only = run_script("05_train_maniskill.py", "--eval-only", str(out / "sft.pt"),
                      "--test-episodes", "4", "--num-envs", "1", "--device", "cpu", cwd=tmp_path)
    assert f"success={fields['sft']} " in only.stdout.strip().splitlines()[-1]

    other = run_script("05_train_maniskill.py", "--eval-only", str(out / "sft.pt"),
                       "--horizon", "8", "--device", "cpu", cwd=tmp_path, ok=False)
    assert "--horizon" in one_clear_line(other)


@pytest.mark.parametrize("flags, words", [
    (["--task", "PickCub-v1"], ["--task PickCub-v1", "PickCube-v1"]),
    (["--task", "PickSingleYCB-v1"], ["--task PickSingleYCB-v1", "controller"]),
    (["--task", "RollBall-v1"], ["--task RollBall-v1", "controller"]),
    (["--sft", "nothing.pt"], ["--sft nothing.pt"]),
    (["--ood-episodes", "0"], ["--ood-episodes"]),
    (["--test-episodes", "100001"], ["--test-episodes"]),
    (["--num-demos", "0"], ["--num-demos"]),
    (["--episodes", "12"], ["--episodes 12", "8"]),
    (["--eval-only", "nothing.pt"], ["--eval-only nothing.pt"]),
    (["--resume"], ["--resume", "last.pt"]),
    (["--rollout", "ode"], ["--rollout ode", "--target endpoint"]),
])
def test_bad_input_gets_one_line_naming_the_flag(tmp_path, flags, words):
    result = run_script("05_train_maniskill.py", *flags, "--device", "cpu", "--out", "new",
                        cwd=tmp_path, ok=False)
    line = one_clear_line(result)
    assert all(word in line for word in words)
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------
# The tasks


@pytest.mark.parametrize("task", list(mani.TASKS))
def test_every_expert_solves_its_task(task):
    sim = mani.ManiSkillSim(task)
    assert sum(solve(sim, 300 + s, mani.TASKS[task].max_steps)[1] for s in range(8)) >= 7


@pytest.fixture(scope="module")
def pads():
    return mani.ManiSkillSim("PutOnPad-v1")


def test_the_instruction_names_the_thing_and_the_pad_that_count(pads):
    """The offsets of a slot are those of the actor with that name; the others' are zero; and the
    only success is the named thing on the named pad: any other thing or pad is none."""
    from mani_skill.utils.structs.pose import Pose
    for seed in range(6):
        pads.reset([seed], [0])
        env, obs = pads.env, pads.observe()
        words = obs["instruction"][0].split()
        slots = [a.name for a in env.things] + [a.name for a in env.pads]
        offsets = obs["state"][0, 5:].reshape(9, 3)
        thing, pad = f"{words[2]} {words[3]}", f"{words[6]} pad"
        assert (slots.index(thing), slots.index(pad) - 6) in mani.TRAINED
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


def test_success_needs_an_open_hand_and_a_thing_at_rest(pads):
    actions, ok = solve(pads, 5)
    assert ok and not episode(pads, 5, actions[:-1])[1][-1]
    pads.reset([5], [0])
    for action in actions:
        pads.advance(action[None])
    thing = pads.env.things[pads.slots()[0][0]]
    assert bool(pads.env.evaluate()["success"])
    thing.set_linear_velocity(torch.tensor([0.1, 0, 0]))
    assert not bool(pads.env.evaluate()["success"])
    thing.set_linear_velocity(torch.zeros(3))
    closed = torch.tensor([1.] * 7 + [0] * 2)
    pads.env.agent.robot.set_qpos(pads.env.agent.robot.get_qpos() * closed)
    assert not bool(pads.env.evaluate()["success"])


def test_held_out_combinations_hide_no_colour_shape_or_pair():
    """A policy has met every colour, shape and pad, and every two of them together."""
    def triple(combination):
        thing, pad = combination
        return thing // 2, thing % 2, pad

    every = set(map(triple, mani.COMBINATIONS))
    trained, held = set(map(triple, mani.TRAINED)), set(map(triple, mani.HELD_OUT))
    assert len(held) == 6 and len(trained) == 12 and not held & trained
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert {(c[a], c[b]) for c in trained} == {(c[a], c[b]) for c in every}


def test_an_episode_of_the_language_task_does_not_depend_on_the_one_before(pads):
    actions = solve(pads, 11)[0]
    first = episode(pads, 11, actions)[0]
    solve(pads, 12)
    assert np.array_equal(episode(pads, 11, actions)[0], first)


def test_worker_processes_bring_the_instruction_of_their_episode(pads):
    """gymnasium's shared memory would not; also a worker that has had no episode yet."""
    args = types.SimpleNamespace(task="PutOnPad-v1", obs="state", renderer=None, num_envs=2,
                                 backend="physx_cpu", max_steps=40, horizon=4)
    envs, told = mani.make_envs(args), {}

    def act(obs):
        for state, text in zip(obs["state"], obs["instruction"]):
            told[tuple(state[5:].tolist())] = text
        return np.zeros((2, 4, 4), np.float32), {}

    for seeds in ([3], [4, 6]):
        flow.play(act, envs, seeds)
    envs.close()
    for seed in (3, 4, 6):
        pads.reset([seed], [0])
        obs = pads.observe()
        assert told[tuple(obs["state"][0, 5:].tolist())] == obs["instruction"][0]


def test_the_instruction_decides_which_slots_the_policy_sees():
    """With slots, two states that differ in a slot nobody looks at give one velocity; and where it
    looks depends on the sentence alone."""
    policy = flow.FlowPolicy(2, 3, state_dim=5 + 9, language=True, width=16, slots=3)
    policy.glance.weight.data *= 100
    state, sentences = torch.randn(1, 14), ["put the red cube", "put the blue cube"]
    for sentence in sentences:
        for slot in range(3):
            other = state.clone()
            other[:, 5 + 3 * slot:8 + 3 * slot] += 1
            a, b = (policy.encode({"state": z, "instruction": [sentence]}) for z in (state, other))
            assert a.shape == (1, policy.context_dim)
            wanted = 10 * policy.glance(policy.read([sentence])).view(4, 3).softmax(-1)[:, slot]
            torch.testing.assert_close((b - a)[0, -12:].view(4, 3), wanted[:, None].expand(4, 3),
                                       rtol=1e-3, atol=1e-3)
            assert torch.equal(a[:, :5 + 64], b[:, :5 + 64])


# ------------------------------------------------------------------------------------------------
# Out of distribution


def test_each_variant_changes_what_it_names_and_nothing_else(pads):
    """The same seed with and without a variant: what differs is what its name says."""
    wanted = {axis: {} for axis in ("in-distribution", "vision", "semantic", "execution")}
    for axis, variant, changes in mani.variants(types.SimpleNamespace(task="PutOnPad-v1",
                                                                      obs="state")):
        wanted[axis][variant] = changes
    assert [len(v) for v in wanted.values()] == [1, 4, 5, 4]

    def start(changes, seed=8):
        sim = mani.ManiSkillSim("PutOnPad-v1", changes=changes)
        sim.reset([seed], [0])
        return sim, sim.observe(), sim.env.get_state().numpy()

    pads.reset([8], [0])
    plain, physics = pads.observe(), pads.env.get_state().numpy()
    true = plain["state"][0, 5:].reshape(9, 3)
    for variant, changes in wanted["vision"].items():
        sim, obs, state = start(changes)
        assert np.array_equal(state, physics)                        # it only sees wrongly
        error = (obs["state"][0, 5:].reshape(9, 3) - true)[true.any(1)]
        again = (sim.observe()["state"][0, 5:].reshape(9, 3) - true)[true.any(1)]
        size = float(variant.split()[2]) / 1000
        if "bias" in variant:
            assert np.allclose(np.linalg.norm(error, axis=1), size, atol=1e-6)
            assert np.allclose(error, error[0], atol=1e-6) and np.allclose(error, again)
        else:
            assert size / 2 < error.std() < 2 * size and not np.allclose(error, again)

    for variant, changes in wanted["semantic"].items():
        sim, obs, state = start(changes)
        words, shown = obs["instruction"][0], sim.env.shown[0].tolist()
        pair = sim.slots()[0][0], sim.slots()[1][0] - 6
        assert (pair in mani.HELD_OUT) == ("held-out" in variant)
        assert sum(shown[:6]) == 2 + ("object" in variant)
        assert sum(shown[6:]) == 2 + (variant.endswith("pad"))
        same = words.startswith("put the") and words.endswith(" pad")
        assert same != (variant in ("paraphrase", "pad named first"))
        if not same:
            assert np.array_equal(state, physics)

    starts, arm, moved, friction = wanted["execution"].values()
    xs = np.concatenate([start(starts, s)[0].places()[0] for s in range(4)])[:, 0]
    assert (np.abs(xs[xs > -0.5]) > 0.07).all()
    rest = [start(arm, s)[0].env.agent.robot.get_qpos()[0, :7] for s in range(6)]
    usual = []
    for s in range(6):
        pads.reset([s], [0])
        usual.append(pads.env.agent.robot.get_qpos()[0, :7])
    assert 4 < torch.stack(rest).std(0).mean() / torch.stack(usual).std(0).mean() < 6
    sim, pads_ = start(moved)[0], pads
    pads_.reset([8], [0])
    jumps = []
    for t in range(8):
        for s in (sim, pads_):
            s.advance(np.zeros((1, 4)))
        jumps.append(np.linalg.norm(sim.places() - pads_.places(), axis=-1)[0])
    assert (np.array(jumps[:4]) == 0).all()
    target = sim.slots()[0][0]
    assert jumps[5][target] == pytest.approx(0.03, abs=0.002)
    assert np.delete(jumps[7], target).max() < 1e-3

    def slide(sim):                     # a push of 0.5 m/s: how far until friction ends it
        sim.reset([8], [0])
        thing = sim.env.things[sim.slots()[0][0]]
        thing.set_linear_velocity(torch.tensor([-0.5, 0, 0]))
        a = thing.pose.p[0, 0].item()
        for _ in range(4):
            sim.advance(np.zeros((1, 4)))
        return a - thing.pose.p[0, 0].item()
    assert slide(start(friction)[0]) > 1.2 * slide(pads)


def test_the_ood_table_has_a_row_with_its_interval_for_each_variant(tmp_path):
    torch.manual_seed(0)
    policy = flow.FlowPolicy(4, 4, state_dim=32, language=True, width=16, slots=9)
    flow.save_checkpoint(tmp_path / "p.pt", config=policy.config, policy=policy.state_dict())
    run = run_script("05_train_maniskill.py", "--task", "PutOnPad-v1", "--eval-only", "p.pt",
                     "--eval-ood", "--ood-episodes", 2, "--test-episodes", 2, "--num-envs", 1,
                     "--max-steps", 4, "--device", "cpu", "--out", "new", cwd=tmp_path)
    rows = list(csv.DictReader(open(tmp_path / "new/test.csv")))
    suite = mani.variants(types.SimpleNamespace(task="PutOnPad-v1", obs="state"))
    assert [(r["axis"], r["variant"]) for r in rows] == [("test", "as in training")] + [
        (axis, variant) for axis, variant, _ in suite]
    for row in rows:
        low, high = flow.wilson(np.arange(2) < 2 * float(row["success"]))
        assert float(row["low"]) == pytest.approx(low, abs=1e-4)
        assert float(row["high"]) == pytest.approx(high, abs=1e-4) and row["episodes"] == "2"
    assert "OOD mean" in run.stdout and "RESULT" in run.stdout


def test_the_ood_mean_is_the_mean_of_the_three_axes(tmp_path, monkeypatch, capsys):
    """Successes chosen per variant; the printed means against the definition."""
    args = types.SimpleNamespace(task="PickCube-v1", obs="state", ood_episodes=10, num_steps=4,
                                 out=tmp_path)
    suite = mani.variants(args)
    wins = {variant: k % 4 for k, (_, variant, _) in enumerate(suite)}
    monkeypatch.setattr(nft, "evaluate", lambda policy, envs, seeds, steps, variant:
                        np.arange(len(seeds)) < wins[variant] + policy)
    envs = types.SimpleNamespace(call=lambda name, changes: None)
    mani.evaluate_ood({"a": 0, "b": 3}, args, envs)
    header, a, b = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert header == ["in-distribution", "vision", "execution", "OOD", "mean"]
    for line, bonus in ((a, 0), (b, 3)):
        means = [np.mean([wins[v] + bonus for axis, v, _ in suite if axis == x]) / 10
                 for x in header[:3]]
        assert [float(z) for z in line[1:]] == pytest.approx([*means, np.mean(means[1:])], abs=6e-4)


# ------------------------------------------------------------------------------------------------
# Images


@pytest.fixture(scope="module")
def renderer():
    try:
        return mani.find_renderer()
    except SystemExit as missing:
        if os.environ.get("REQUIRE_VULKAN"):
            raise
        pytest.skip(str(missing))


def in_a_fresh_process(function, *args):
    """Vulkan looks for drivers once, and the tests above have started it without one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def picture(sim, seed):
    sim.reset([seed], [0])
    obs = sim.observe()
    assert obs["rgb"].shape == (1, 1, 3, 128, 128) and obs["rgb"].dtype == np.uint8
    assert obs["state"].shape == (1, 5) and len(obs["instruction"]) == 1
    return obs["rgb"][0, 0].astype(int)


def states_while_drawing(renderer, actions):
    return episode(mani.ManiSkillSim("PutOnPad-v1", obs="rgb", renderer=renderer), 5, actions)[0]


def test_the_renderer_changes_no_physics(renderer, pads):
    actions = solve(pads, 5)[0][:10]
    assert np.array_equal(in_a_fresh_process(states_while_drawing, renderer, actions),
                          episode(pads, 5, actions)[0])


def test_images_show_the_scene_and_the_variants_change_them(renderer):
    in_a_fresh_process(check_images, renderer)


def check_images(renderer):
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
    before, kept = first, [noise for noise in mani.RGB_VISION if "noise" in noise[0]]
    for variant, changes in kept:
        drawn.changes = changes
        noise = (picture(drawn, 3) - first)[(first > 80) & (first < 175)]  # nothing is clipped
        assert noise.std() == pytest.approx(255 * float(variant.split()[-1]), rel=0.2)
    for variant, changes in mani.RGB_VISION:
        if "noise" not in variant:
            drawn.changes = changes          # one after the other, on top of what was changed
            drawn.apply_changes()
            after = picture(drawn, 3)
            assert np.abs(after - before).mean() > 0.02, variant
            if "light" in variant:
                assert after.mean() < 0.9 * before.mean()
            before = after


def test_images_train_end_to_end_and_are_filmed(renderer, tmp_path):
    run = run_script("05_train_maniskill.py", *"--task PutOnPad-v1 --obs rgb --num-demos 1 "
                     "--sft-steps 3 --iterations 1 --episodes 8 --max-steps 16 --eval-every 1 "
                     "--eval-episodes 1 --test-episodes 1 --num-envs 1 --device cpu --video 1 "
                     "--demo-noise 0.02 --out new".split(), cwd=tmp_path)
    assert 8 <= result_line(run)["env_steps"] <= 8 * 16
    film, = (tmp_path / "new/videos").glob("*.mp4")
    assert film.name.split("_")[-1] in ("success.mp4", "failure.mp4")
    import imageio
    assert 1 <= imageio.get_reader(film).count_frames() <= 16
    config = torch.load(tmp_path / "new/best.pt", weights_only=False)["config"]
    assert config["cameras"] == 1 and config["state_dim"] == 5 and config["language"]


def test_without_a_driver_one_line_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setenv("VK_ICD_FILENAMES", str(tmp_path / "none.json"))
    run = run_script("05_train_maniskill.py", "--obs", "rgb", "--device", "cpu", cwd=tmp_path,
                     ok=False)
    line = one_clear_line(run)
    assert "--obs rgb" in line and "chromium-common" in line and "VK_ICD_FILENAMES" in line


# ------------------------------------------------------------------------------------------------
# A worker that dies


def test_a_dying_worker_ends_the_run_in_one_line(tmp_path):
    flags = [*TINY, "--out", "new"]
    flags[flags.index("--episodes") + 1] = "4000"
    run = subprocess.Popen([sys.executable, str(ROOT / "05_train_maniskill.py"), *flags],
                           cwd=tmp_path, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while "validation, SFT" not in run.stdout.readline():
        assert run.poll() is None, run.stderr.read()
    time.sleep(1)
    workers = [p for p in Path("/proc").glob("[0-9]*") if is_worker(p, run.pid)]
    os.kill(int(workers[-1].name), signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    line = errors.strip().splitlines()[-1]
    assert run.returncode == 1 and "PickCube-v1" in line and "--resume" in line
    told = [int(word.strip(",")) for word in line.split() if word.strip(",").isdigit()]
    assert told and all(mani.TRAIN <= seed < mani.TRAIN + 500 for seed in told)


def is_worker(folder, parent):
    try:
        told = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        return told[1] == str(parent) and "spawn_main" in (folder / "cmdline").read_text()
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------
# The baselines


def test_gae_is_the_sum_of_discounted_deltas_of_each_episode():
    """Against the definition, A_i = sum_j (gamma lambda)^j delta_{i+j}; episodes interleave."""
    episode = torch.tensor([0, 1, 0, 1, 1, 0, 1])
    values, success = torch.randn(7), np.array([True, False])
    advantages, returns = mani.gae(values, success, episode, gamma=0.9, lam=0.7)
    for e in (0, 1):
        V = values[episode == e].tolist() + [0.0]
        rewards = [0.0] * (len(V) - 2) + [float(success[e])]
        deltas = [r + 0.9 * V[i + 1] - V[i] for i, r in enumerate(rewards)]
        wanted = [sum(0.63**j * d for j, d in enumerate(deltas[i:])) for i in range(len(deltas))]
        torch.testing.assert_close(advantages[episode == e], torch.tensor(wanted))
    torch.testing.assert_close(returns, advantages + values)


def flow_sde_batch(rows=10, K=4):
    """A batch as rollout(sampler="flow-sde") records it, from a policy on made-up observations."""
    policy = flow.FlowPolicy(3, 2, state_dim=5, width=16)
    obs, k = {"state": torch.randn(rows, 5)}, torch.arange(rows) % K
    _, path = mani.sde.sde_sample(policy, obs, K, 0.3, noisy=k[:, None])
    mask = torch.arange(3) < torch.randint(1, 4, (rows, 1))
    return policy, {"obs": obs, "x": path.x, "v": path.v, "k": k[:, None], "mask": mask,
                    "y": torch.randn(rows), "returns": torch.rand(rows),
                    "episode": torch.arange(rows)}


def test_flow_sde_has_noise_in_one_step_and_the_ode_elsewhere():
    policy, batch = flow_sde_batch()
    for b, k in enumerate(batch["k"][:, 0].tolist()):
        euler = batch["x"][b, :-1] - 0.25 * batch["v"][b]
        off = (batch["x"][b, 1:] - euler).abs().amax((1, 2))
        assert off[k] > 0.01 and (off[torch.arange(4) != k] < 1e-5).all()


def test_the_first_ppo_step_is_the_policy_gradient():
    """At ratio 1 the clipped objective's gradient is -E[A grad log pi]; one SGD step shows it."""
    policy, batch = flow_sde_batch()
    reference = mani.copy.deepcopy(policy)
    info = mani.ppo_update(policy, None, torch.optim.SGD(policy.parameters(), lr=1.0), batch,
                           noise_level=0.3, epochs=1, minibatch=10, grad_clip=1e9)
    objective, dt = 0, 0.25
    for b, k in enumerate(batch["k"][:, 0].tolist()):
        t, x_t = 1 - k / 4, batch["x"][b, k]
        sigma = 0.3 * math.sqrt(t / (1 - (0.75 if k == 0 else t)))
        obs = {"state": batch["obs"]["state"][b:b + 1]}
        v = reference.velocity(x_t[None], torch.tensor([t]), reference.encode(obs))[0]
        x0_hat, x1_hat = x_t - t * v, x_t + (1 - t) * v
        mean = (1 - t + dt) * x0_hat + (t - dt - sigma**2 * dt / (2 * t)) * x1_hat
        std = torch.tensor(sigma * math.sqrt(dt))
        density = torch.distributions.Normal(mean, std).log_prob(batch["x"][b, k + 1])
        objective = objective + batch["y"][b] * density[batch["mask"][b]].sum() / 10
    objective.backward()
    for p, q in zip(policy.parameters(), reference.parameters()):
        torch.testing.assert_close(p.detach(), (q + q.grad).detach(), rtol=1e-3, atol=1e-5)
    assert info["ratio"] == pytest.approx(1, abs=1e-4) and info["clipped"] == 0


def test_ppo_clips_and_its_critic_does_not_train_the_encoder():
    policy, batch = flow_sde_batch()
    critic, before = mani.Critic(5), mani.copy.deepcopy(policy)
    batch["y"] = torch.zeros(10)
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=1e-2)
    losses = [mani.ppo_update(policy, critic, optimizer, batch, noise_level=0.3, epochs=20,
                              minibatch=10)["value_loss"] for _ in range(3)]
    assert losses[2] < 0.5 * losses[0]                     # the critic learns its returns
    for p, q in zip(policy.parameters(), before.parameters()):
        torch.testing.assert_close(p, q)                   # no advantage, no change of the policy
    batch["y"] = torch.ones(10)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    for _ in range(5):
        info = mani.ppo_update(policy, None, optimizer, batch, noise_level=0.3, epochs=10,
                               minibatch=10)
    assert info["clipped"] > 0.5 and info["grad_norm"] < 10


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_a_baseline_trains_and_resumes(tmp_path, algo):
    run_script("05_train_maniskill.py", *TINY, "--algo", algo, "--out", "new", cwd=tmp_path)
    run = run_script("05_train_maniskill.py", *TINY, "--algo", algo, "--out", "new", "--resume",
                     "--iterations", "2", cwd=tmp_path)
    log = list(csv.DictReader(open(tmp_path / "new/log.csv")))
    assert [row["iteration"] for row in log] == ["1", "2"] and f" {algo}=" in run.stdout
    assert ("value_loss" in log[0]) == (algo == "ppo")
    other = run_script("05_train_maniskill.py", *TINY, "--out", "new", "--resume", cwd=tmp_path,
                       ok=False)
    assert f"--algo {algo}" in one_clear_line(other)


def test_two_ranks_of_torchrun_share_the_episodes_of_one_run(tmp_path):
    flags = [*TINY, "--algo", "ppo", "--eval-ood", "--ood-episodes", "3", "--out", "new"]
    flags[flags.index("--episodes") + 1] = "16"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
                          str(ROOT / "05_train_maniskill.py"), *flags], cwd=tmp_path, text=True,
                         capture_output=True, timeout=400, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("RESULT") == 1          # rank 1 is silent
    log, = csv.DictReader(open(tmp_path / "new/log.csv"))
    assert 16 <= int(log["env_steps"]) <= 16 * 24 and float(log["train_sde"]) * 16 % 1 == 0
    rows = list(csv.DictReader(open(tmp_path / "new/test.csv")))
    assert {row["axis"] for row in rows} == {"test", "in-distribution", "vision", "execution"}
    assert all(row["episodes"] == ("4" if row["axis"] == "test" else "3") for row in rows)
