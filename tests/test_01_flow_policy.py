"""01: flow matching against closed forms, the toy world against a scalar replay of its rules."""

import importlib

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from conftest import MixtureFlow, Scripted, result_line, run_script

flow = importlib.import_module("01_flow_policy")

# ------------------------------------------------------------------------------------------------
# Flow matching and ODE sampling


class PointMass:
    """The exact velocity when all data is one point c: v = (x_t - c) / t. Keeps its inputs."""

    horizon, action_dim, c = 1, 1, 0.7

    def encode(self, obs):
        return torch.zeros(len(obs["state"]), 0)

    def velocity(self, x_t, t, ctx):
        self.x_t, self.t = x_t, t
        return (x_t - self.c) / t[:, None, None]


def states(count):
    return {"state": torch.zeros(count, 1)}


def test_the_exact_velocity_has_zero_flow_matching_loss():
    policy, x_0 = PointMass(), torch.full((5000, 1, 1), PointMass.c)
    assert flow.flow_matching_loss(policy, states(5000), x_0) < 1e-6


def test_zero_velocity_costs_the_second_moment_of_its_target():
    """E (x_1 - x_0)^2 = 1 + c^2."""
    policy, x_0 = PointMass(), torch.full((20000, 1, 1), PointMass.c)
    policy.velocity = lambda x_t, t, ctx: torch.zeros_like(x_t)
    loss = flow.flow_matching_loss(policy, states(20000), x_0)
    assert loss == pytest.approx(1 + PointMass.c**2, rel=0.05)


def test_the_interpolant_mixes_data_with_normal_noise_at_uniform_times():
    policy, x_0 = PointMass(), torch.full((5000, 1, 1), PointMass.c)
    flow.flow_matching_loss(policy, states(5000), x_0)
    noise = (policy.x_t[:, 0, 0] - (1 - policy.t) * PointMass.c) / policy.t
    assert stats.kstest(policy.t, "uniform").pvalue > 1e-3
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(policy.t, noise)[0, 1]) < 0.06


def test_the_exact_velocity_is_the_minimiser():
    """Any other field has a larger loss on the same data: here, the exact one plus a constant."""
    policy, x_0 = MixtureFlow([0.3, 0.7], [-1, 1], [0.2, 0.3]), torch.empty(20000, 1, 1)
    pick = torch.rand(20000) < 0.7
    x_0[:, 0, 0] = torch.where(pick, 1 + 0.3 * torch.randn(20000), -1 + 0.2 * torch.randn(20000))
    exact = policy.velocity
    losses = []
    for shift in (0, 0.3, -0.3):
        torch.manual_seed(1)
        policy.velocity = lambda x_t, t, ctx: exact(x_t, t, ctx) + shift
        losses.append(flow.flow_matching_loss(policy, states(20000), x_0).item())
    # E |v + c - target|^2 = E |v - target|^2 + c^2 when v is the conditional mean
    np.testing.assert_allclose(losses[1:], losses[0] + 0.09, atol=0.02)


@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_the_ode_reaches_a_point_mass_in_any_number_of_steps(num_steps):
    x_0 = flow.ode_sample(PointMass(), states(6), num_steps)
    torch.testing.assert_close(x_0, torch.full((6, 1, 1), PointMass.c))


def test_the_ode_converges_to_scipys_solution_at_first_order():
    policy = MixtureFlow([0.4, 0.6], [-1, 0.8], [0.3, 0.2])
    x_1 = torch.linspace(-2, 2, 9)[:, None, None].double()

    def v(t, x):
        x_t = torch.from_numpy(x)[:, None, None]
        return policy.velocity(x_t, torch.full((9,), t), None)[:, 0, 0]

    exact = integrate.solve_ivp(v, (1, 0), x_1[:, 0, 0].numpy(), rtol=1e-8, atol=1e-8).y[:, -1]
    errors = [np.abs(flow.ode_sample(policy, states(9), K, x_1)[:, 0, 0].numpy() - exact).mean()
              for K in (200, 400)]
    assert errors[1] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_the_ode_path_is_the_slow_euler_loop():
    policy, obs, K = flow.FlowPolicy(2, 3, state_dim=1), states(5), 4
    x = x_1 = torch.randn(5, 2, 3)
    path = flow.ode_path(policy, obs, K, x_1)
    assert path.shape == (5, K + 1, 2, 3) and not path.requires_grad
    for k in range(K):
        torch.testing.assert_close(path[:, k], x)
        t = torch.full((5,), [1.0, 0.75, 0.5, 0.25][k])
        x = x - 0.25 * policy.velocity(x, t, policy.encode(obs)).detach()
    torch.testing.assert_close(path[:, K], x)
    torch.testing.assert_close(flow.ode_sample(policy, obs, K, x_1), x)


def test_the_start_noise_is_standard_normal():
    x_1 = flow.ode_path(PointMass(), states(5000), 1)[:, 0]
    assert stats.kstest(x_1.flatten(), "norm").pvalue > 1e-3


def test_sft_learns_both_modes_and_their_proportions():
    """One action; 30 % of the demos say -1, 70 % say +1 (std 0.1). A regression would say 0.4."""
    torch.manual_seed(0)
    left = torch.rand(4000) < 0.3
    chunks = (torch.where(left, -1.0, 1.0) + 0.1 * torch.randn(4000))[:, None, None]
    policy = flow.FlowPolicy(1, 1, state_dim=1, width=64)
    flow.train_sft(policy, states(4000), chunks, steps=1200, lr=3e-3)
    samples = policy.denormalise(flow.ode_sample(policy, states(4000), 32)).flatten()
    low, high = samples[samples < 0], samples[samples > 0]
    assert len(low) / 4000 == pytest.approx(0.3, abs=0.05)
    assert low.median().item() == pytest.approx(-1, abs=0.1)
    assert high.median().item() == pytest.approx(1, abs=0.1)
    assert (samples.abs() < 0.5).float().mean() < 0.05
    assert low.std() < 0.25 and high.std() < 0.25


def test_sft_follows_the_observation():
    """The demos' action is twice the state; so must the policy's be, between the demos too."""
    torch.manual_seed(0)
    obs = {"state": torch.linspace(-1, 1, 64)[:, None]}
    policy = flow.FlowPolicy(1, 1, state_dim=1, width=64)
    flow.train_sft(policy, obs, 2 * obs["state"][:, None], steps=600, lr=3e-3)
    test = {"state": torch.tensor([[-0.71], [0.03], [0.52]]).repeat_interleave(200, 0)}
    actions = policy.denormalise(flow.ode_sample(policy, test, 8)).view(3, 200)
    np.testing.assert_allclose(actions.median(1)[0], [-1.42, 0.06, 1.04], atol=0.15)


def test_sft_without_demos_names_the_flag():
    policy = flow.FlowPolicy(1, 1, state_dim=1)
    with pytest.raises(ValueError, match="--num-demos"):
        flow.train_sft(policy, states(0), torch.zeros(0, 1, 1), steps=1)


# ------------------------------------------------------------------------------------------------
# Normalisation, encoders, checkpoints


def fitted():
    """A policy with statistics of random demos, one state and one action dimension constant."""
    policy = flow.FlowPolicy(3, 4, state_dim=2)
    obs = {"state": torch.cat([5 + 3 * torch.randn(500, 1), torch.full((500, 1), 7.0)], 1)}
    chunks = torch.randn(500, 3, 4) * torch.tensor([1, 10, 0.1, 0]) + torch.tensor([0, 3, 0, -2.0])
    policy.fit_normalisation(obs, chunks)
    return policy, obs, chunks


def test_normalisation_round_trip():
    policy, _, chunks = fitted()
    torch.testing.assert_close(policy.denormalise(policy.normalise(chunks)), chunks)


def test_actions_get_their_1_and_99_percent_quantiles_at_minus_and_plus_one():
    policy, _, chunks = fitted()
    quantiles = np.percentile(policy.normalise(chunks)[..., :3].flatten(0, 1), [1, 99], axis=0)
    np.testing.assert_allclose(quantiles, [[-1] * 3, [1] * 3], atol=1e-4)


def test_states_are_encoded_with_mean_0_and_std_1():
    policy, obs, _ = fitted()
    ctx = policy.encode(obs)[:, 0].double().numpy()
    assert abs(ctx.mean()) < 1e-5 and abs(ctx.std(ddof=1) - 1) < 1e-5


def test_a_dimension_that_never_moves_in_the_demos_stays_put():
    policy, obs, chunks = fitted()
    assert policy.normalise(chunks).isfinite().all() and policy.encode(obs).isfinite().all()
    noise = policy.denormalise(3 * torch.randn(1000, 3, 4))[..., 3]
    assert (noise + 2).abs().max() < 0.2                    # 3 stds of noise barely move it


def full_policy():
    return flow.FlowPolicy(4, 3, state_dim=5, cameras=2, language=True, width=32)


def full_obs(sentences):
    B = len(sentences)
    return {"state": torch.randn(B, 5), "instruction": sentences,
            "rgb": torch.randint(0, 256, (B, 2, 3, 64, 64), dtype=torch.uint8)}


SENTENCES = ["pick up the milk", "pick up the butter", "open the drawer"]


def test_state_images_and_sentences_make_one_context():
    policy, obs = full_policy(), full_obs(SENTENCES)
    ctx = policy.encode(obs)
    assert ctx.shape == (3, 5 + 2 * 128 + 64)
    v = policy.velocity(torch.randn(3, 4, 3), torch.rand(3), ctx)
    assert v.shape == (3, 4, 3) and v.isfinite().all()


@pytest.mark.parametrize("kind", ["state", "rgb", "instruction"])
def test_each_kind_of_observation_can_stand_alone(kind):
    policy = flow.FlowPolicy(4, 3, state_dim=5 * (kind == "state"), cameras=2 * (kind == "rgb"),
                             language=kind == "instruction")
    obs = {kind: full_obs(SENTENCES)[kind]}
    assert flow.ode_sample(policy, obs, 2).shape == (3, 4, 3)


@pytest.mark.parametrize("change", ["state", "rgb", "instruction"])
def test_each_kind_of_observation_changes_the_velocity(change):
    policy, a, b = full_policy(), full_obs(SENTENCES[:1]), full_obs(SENTENCES[1:2])
    x_t, t = torch.randn(1, 4, 3), torch.rand(1)
    v = policy.velocity(x_t, t, policy.encode(a))
    v_changed = policy.velocity(x_t, t, policy.encode({**a, change: b[change]}))
    assert (v - v_changed).abs().max() > 1e-6  # an untrained net looks nowhere in particular


def test_the_velocity_depends_on_time():
    policy, x_t = full_policy(), torch.randn(1, 4, 3)
    ctx = policy.encode(full_obs(SENTENCES[:1]))
    v = [policy.velocity(x_t, torch.tensor([t]), ctx) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert all((a - b).abs().max() > 1e-5 for i, a in enumerate(v) for b in v[:i])


def test_the_two_cameras_are_told_apart():
    policy, obs = full_policy(), full_obs(SENTENCES[:1])
    swapped = {**obs, "rgb": obs["rgb"].flip(1)}
    assert (policy.encode(obs) - policy.encode(swapped)).abs().max() > 1e-4


def test_an_image_is_scaled_before_it_is_seen():
    """Dark and bright images keep the convolutions' inputs of order one, so maps stay apart."""
    policy, seen = flow.FlowPolicy(1, 1, cameras=1), []
    policy.eye[0].register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1, 1).expand(2, 1, 3, 64, 64)
    policy.encode({"rgb": images})
    torch.testing.assert_close(seen[0].flatten(1).mean(1), torch.tensor([-0.5, 0.5]))


def test_a_feature_is_the_mean_position_of_its_map():
    maps = torch.randn(2, 3, 4, 6)
    points = flow.looks_at(maps)
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


def test_a_resnet_sees_what_torchvision_sees(tmp_path, monkeypatch):
    """Weights from a file where torchvision keeps its downloads; maps of its third stage."""
    models = pytest.importorskip("torchvision").models
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    reference = models.resnet18().eval()
    name = models.ResNet18_Weights.DEFAULT.url.split("/")[-1]
    torch.save(reference.state_dict(), tmp_path / "hub/checkpoints" / name)
    eye = flow.image_net("resnet18", "DEFAULT")
    x = images = torch.randn(2, 3, 64, 64)
    for layer in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"):
        x = getattr(reference, layer)(x)
    torch.testing.assert_close(eye[:-1](images), x)
    assert eye(images).shape == (2, 64, 4, 4)
    torch.testing.assert_close(eye(images)[:1], eye(images[:1]), rtol=1e-3, atol=1e-4)
    policy = flow.FlowPolicy(2, 1, cameras=1, backbone="resnet18")
    flow.save_checkpoint(tmp_path / "p.pt", config=policy.config, policy=policy.state_dict())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))  # a checkpoint fetches nothing
    loaded = flow.load_policy(tmp_path / "p.pt")
    obs = {"rgb": torch.randint(0, 256, (3, 1, 3, 64, 64), dtype=torch.uint8)}
    torch.testing.assert_close(loaded.encode(obs), policy.encode(obs))


def test_encoding_a_batch_is_encoding_one_by_one():
    policy, obs = full_policy(), full_obs(SENTENCES + SENTENCES[:1])
    alone = [policy.encode(flow.take(obs, torch.tensor([i]))) for i in range(4)]
    torch.testing.assert_close(policy.encode(obs), torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sentence", ["fetch Großmutters 茶", "", "word " * 100])
def test_unseen_words_are_no_error(sentence):
    policy = flow.FlowPolicy(1, 1, language=True)
    ctx = policy.encode({"instruction": [sentence, SENTENCES[0]]})
    assert ctx.isfinite().all() and (ctx[0] - ctx[1]).abs().max() > 1e-4


def test_different_sentences_differ_and_capitals_do_not():
    policy = flow.FlowPolicy(1, 1, language=True)
    ctx = policy.encode({"instruction": SENTENCES + ["Pick up the MILK"]})
    assert all((ctx[i] - ctx[j]).abs().max() > 1e-4 for i in range(3) for j in range(i))
    torch.testing.assert_close(ctx[3], ctx[0])


def test_wrong_shapes_are_named():
    policy = flow.FlowPolicy(4, 2, state_dim=1)
    ctx = policy.encode(states(3))
    with pytest.raises(AssertionError, match="x_t has shape"):
        policy.velocity(torch.zeros(3, 2, 4), torch.zeros(3), ctx)
    with pytest.raises(AssertionError, match="t has shape"):
        policy.velocity(torch.zeros(3, 4, 2), torch.zeros(1), ctx)


def test_a_checkpoint_comes_back_whole(tmp_path):
    policy, obs = full_policy(), full_obs(SENTENCES)
    policy.fit_normalisation(obs, torch.randn(3, 4, 3))
    flow.save_checkpoint(tmp_path / "new" / "p.pt", config=policy.config,
                         policy=policy.state_dict(), note=7)
    loaded = flow.load_policy(tmp_path / "new" / "p.pt")
    x_t, t = torch.randn(3, 4, 3), torch.rand(3)
    torch.testing.assert_close(loaded.velocity(x_t, t, loaded.encode(obs)),
                               policy.velocity(x_t, t, policy.encode(obs)), rtol=0, atol=0)
    torch.testing.assert_close(loaded.denormalise(x_t), policy.denormalise(x_t), rtol=0, atol=0)
    assert torch.load(tmp_path / "new" / "p.pt", weights_only=False)["note"] == 7
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["p.pt"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "p.pt"
    flow.save_checkpoint(path, number=1)

    def dies_halfway(content, file):
        open(file, "wb").write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", dies_halfway)
    with pytest.raises(OSError):
        flow.save_checkpoint(path, number=2)
    assert torch.load(path)["number"] == 1


# ------------------------------------------------------------------------------------------------
# The toy world, against its rules played slowly with scalars


def replay(world, start, gap_y, actions):
    """One episode by the rules, one action at a time -> (outcome, steps played, positions)."""
    (x, y), trail = start, [tuple(start)]
    for step, (a, b) in enumerate(actions, start=1):
        new_x = max(-1, min(1, x + world.speed * max(-1, min(1, a))))
        new_y = max(-1, min(1, y + world.speed * max(-1, min(1, b))))
        if x < 0 <= new_x or new_x < 0 <= x:                              # meets the wall at x = 0
            y_wall = y + (new_y - y) * (0 - x) / (new_x - x)
            if not gap_y - world.gap <= y_wall <= gap_y + world.gap:
                return "crash", step, trail + [(0, y_wall)]
        x, y = new_x, new_y
        trail.append((x, y))
        if (x - world.goal[0])**2 + (y - world.goal[1])**2 < world.goal_radius**2:
            return "success", step, trail
        if step == world.max_steps:
            return "timeout", step, trail
    return "running", len(actions), trail


def clumsy(state, horizon, clumsiness):
    """The expert with a hand that shakes, always the same way in the same state: (N, H, 2)."""
    phase = 9 * np.arange(horizon)[None, :, None] + state[:, 2:, None]
    shake = np.sin(40 * state[:, None, :2] + phase)
    return 0.97 * flow.expert_chunk(state, horizon).astype(float) + clumsiness * shake


@pytest.mark.parametrize("horizon", [1, 4, 5])
def test_gap_world_plays_by_the_rules(horizon):
    """400 episodes, from careful to wild: outcome, executed counts and positions of every chunk."""
    envs, outcomes = flow.GapWorld(400, horizon=horizon), set()
    obs, _ = envs.reset(seed=list(range(400)))
    start, gap_y, clumsiness = envs.position.copy(), envs.gap_y.copy(), np.linspace(0, 2.5, 400)
    actions, played, ended = [[] for _ in range(400)], np.zeros(400, int), np.zeros(400, bool)
    while not ended.all():
        chunk = clumsy(obs["state"], horizon, clumsiness[:, None, None])
        obs, reward, terminated, truncated, info = envs.step(chunk)
        assert envs.observation_space.contains(obs)
        for i in np.flatnonzero(~ended):
            actions[i] += list(chunk[i].astype(float))
            outcome, steps, trail = replay(envs, start[i], gap_y[i], actions[i])
            assert info["executed"][i] == steps - played[i]
            assert info["success"][i] == reward[i] == (outcome == "success")
            assert (terminated[i] or truncated[i]) == (outcome != "running")
            assert truncated[i] == (outcome == "timeout")
            np.testing.assert_allclose(obs["state"][i], [*trail[-1], gap_y[i]], atol=1e-6)
            played[i] = steps
            outcomes.add(outcome)
        ended |= terminated | truncated
    assert outcomes >= {"success", "crash", "timeout"}


def test_a_finished_robot_rests_where_it_ended():
    envs = flow.GapWorld(30)
    obs, _ = envs.reset(seed=list(range(30)))
    for _ in range(envs.max_steps):
        before, over = envs.observe()["state"], envs.over.copy()
        obs, *_, info = envs.step(clumsy(obs["state"], 4, 1.5))
        np.testing.assert_array_equal(obs["state"][over], before[over])
        assert not info["executed"][over].any() and not info["success"][over].any()
    assert over.all() and (before[:, 0] > 0.7).any()


def test_a_crash_on_the_very_last_step_is_no_truncation():
    envs = flow.GapWorld(1, horizon=1)
    envs.reset(seed=[0])
    envs.position[:], envs.gap_y[:], envs.steps[:] = [-0.05, 0.5], 0, envs.max_steps - 1
    _, _, terminated, truncated, info = envs.step(np.array([[[1.0, 0.0]]]))
    assert terminated[0] and not truncated[0] and not info["success"][0]


def test_starts_fill_their_range_evenly():
    for width in (0.3, 0.9):
        envs = flow.GapWorld(2000, width)
        state = envs.reset(seed=list(range(2000)))[0]["state"]
        assert (state[:, 0] == np.float32(-0.8)).all()
        assert stats.kstest(state[:, 1], stats.uniform(-width, 2 * width).cdf).pvalue > 1e-3
        assert stats.kstest(state[:, 2], stats.uniform(-0.3, 0.6).cdf).pvalue > 1e-3
        assert abs(np.corrcoef(state[:, 1], state[:, 2])[0, 1]) < 0.08


def test_a_seed_starts_the_same_episode_in_any_slot_and_company():
    together = flow.GapWorld(5).reset(seed=[11, 22, 33, 44, 55])[0]["state"]
    np.random.rand(3)
    alone = flow.GapWorld(1).reset(seed=[33])[0]["state"]
    np.testing.assert_array_equal(together[2], alone[0])
    assert len(np.unique(together[:, 1])) == 5


def test_reset_mask_leaves_the_other_slots_alone():
    envs = flow.GapWorld(3)
    envs.reset(seed=[1, 2, 3])
    before = envs.step(np.ones((3, 4, 2)) * 0.5)[0]["state"]
    after = envs.reset(seed=[0, 9, 0], options={"reset_mask": np.array([False, True, False])})[0]
    np.testing.assert_array_equal(after["state"][[0, 2]], before[[0, 2]])
    alone = flow.GapWorld(1).reset(seed=[9])[0]["state"][0]
    np.testing.assert_array_equal(after["state"][1], alone)
    assert envs.steps.tolist() == [4, 0, 4]


@pytest.mark.parametrize("width", [0.3, 0.9])
@pytest.mark.parametrize("horizon", [1, 4])
def test_the_expert_succeeds_from_everywhere(width, horizon):
    def act(obs):
        return flow.expert_chunk(obs["state"].numpy(), horizon), {}

    assert flow.play(act, flow.GapWorld(1000, width, horizon), range(1000))[0].all()


def test_demos_are_the_experts_next_actions_from_narrow_starts():
    obs, chunks = flow.toy_demos(6, seed=3)
    state = obs["state"].numpy()
    starts = np.flatnonzero(state[:, 0] == np.float32(-0.8))
    assert len(starts) == 6 and (np.abs(state[starts, 1]) <= 0.3).all()
    assert chunks.shape == (len(state), 4, 2)
    for first, end in zip(starts, [*starts[1:], len(state)]):
        taken = [flow.expert_chunk(s[None], 1)[0, 0] for s in state[first:end]]
        for i in range(end - first):
            expected = [taken[min(i + h, len(taken) - 1)] for h in range(4)]
            np.testing.assert_allclose(chunks[first + i], expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------
# play and evaluate


class Diary(flow.GapWorld):
    """A GapWorld that writes down the seeds it was asked to play and the chunks it was given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seeds, self.chunks = [], []

    def reset(self, *, seed, options=None):
        self.seeds += [s for s, fresh in zip(seed, options["reset_mask"]) if fresh]
        return super().reset(seed=seed, options=options)

    def step(self, chunks):
        self.chunks.append(chunks)
        return super().step(chunks)


def play_clumsily(slots, seeds, horizon=4):
    envs = Diary(slots, horizon=horizon)

    def act(obs):
        actions = clumsy(obs["state"].numpy(), horizon, 1.2)
        return actions, {"actions": torch.from_numpy(actions)}

    return envs, *flow.play(act, envs, seeds)


@pytest.mark.parametrize("slots", [1, 7, 40, 55])
def test_every_seed_is_played_exactly_once(slots):
    seeds = [100 + 3 * i for i in range(40)]
    envs, success, rows = play_clumsily(slots, seeds)
    assert sorted(envs.seeds) == seeds and len(success) == 40
    assert sorted(set(rows["episode"].tolist())) == list(range(40))


@pytest.mark.parametrize("slots", [1, 7])
def test_few_slots_play_the_same_episodes_as_one_slot_per_seed(slots):
    _, success, rows = play_clumsily(slots, range(40))
    _, success_all, rows_all = play_clumsily(40, range(40))
    assert 0 < success.sum() < 40                          # both outcomes occur
    np.testing.assert_array_equal(success, success_all)
    for e in range(40):
        mine, other = rows["episode"] == e, rows_all["episode"] == e
        for key in ("mask", "actions"):
            assert torch.equal(rows[key][mine], rows_all[key][other])
        assert torch.equal(rows["obs"]["state"][mine], rows_all["obs"]["state"][other])


@pytest.mark.parametrize("horizon", [1, 4, 5])
def test_rows_hold_what_a_scalar_replay_of_each_episode_sees(horizon):
    """The observation at the start of each chunk, and a mask that ends where the episode does."""
    envs, success, rows = play_clumsily(7, range(40), horizon)
    ends_inside = 0
    for e in range(40):
        mine = rows["episode"] == e
        world = flow.GapWorld(1)
        world.reset(seed=[e])
        actions = rows["actions"][mine].flatten(0, 1).double().numpy()
        outcome, steps, trail = replay(world, world.position[0], world.gap_y[0], actions)
        mask = rows["mask"][mine].flatten()
        assert success[e] == (outcome == "success")
        assert mask.tolist() == [i < steps for i in range(len(actions))]
        assert len(actions) - horizon < steps <= len(actions)          # no chunk after the end
        np.testing.assert_allclose(rows["obs"]["state"][mine][:, :2], trail[:-1][::horizon],
                                   atol=1e-6)
        ends_inside += not mask[-1]
    assert ends_inside > 10 or horizon == 1


def test_evaluate_repeats_itself_and_leaves_the_random_stream_alone():
    policy, before = flow.FlowPolicy(4, 2, state_dim=3), torch.random.get_rng_state()
    envs = flow.GapWorld(20)
    policy.action_scale.fill_(0.5)
    first, chunk = [(flow.evaluate(policy, diary, range(20)), diary.chunks[0])
                    for diary in (Diary(20), Diary(20))]
    np.testing.assert_array_equal(first[1], chunk[1])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_evaluate_acts_with_the_ode_in_environment_units():
    """A foreign policy that plays the expert succeeds; one that denormalises wrongly does not."""
    policy = Scripted(lambda state: flow.expert_chunk(state, 4), 4)
    assert flow.evaluate(policy, flow.GapWorld(50, 0.3), range(50)).all()
    policy.denormalise = lambda x_0: -x_0
    assert not flow.evaluate(policy, flow.GapWorld(50, 0.3), range(50)).any()


def test_wilson_is_scipys():
    for k, n in ((0, 20), (7, 20), (20, 20), (431, 1000)):
        exact = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
        np.testing.assert_allclose(flow.wilson([True] * k + [False] * (n - k)), exact, atol=1e-4)


def test_take_picks_rows_of_tensors_and_sentences():
    obs = {"state": torch.arange(4)[:, None], "instruction": list("abcd")}
    rows = flow.take(obs, torch.tensor([3, 1]))
    assert rows["state"].flatten().tolist() == [3, 1] and rows["instruction"] == ["d", "b"]


# ------------------------------------------------------------------------------------------------
# The script


def test_the_script_trains_saves_and_reports(tmp_path):
    flags = ("--sft-steps", 10, "--num-demos", 2, "--episodes", 8, "--out", tmp_path / "out")
    done = run_script("01_flow_policy.py", *flags, cwd=tmp_path)
    result = result_line(done)
    assert 0 <= result["wide"] <= 1 and 0 <= result["narrow"] <= 1 and result["episodes"] == 8
    checkpoint, = (tmp_path / "out").glob("*.pt")
    assert flow.load_policy(checkpoint).config["state_dim"] == 3
    assert (tmp_path / "out" / "flow_policy.png").stat().st_size > 1000
    assert "is missing" in done.stdout
    again = run_script("01_flow_policy.py", *flags, cwd=tmp_path)
    assert "is missing" not in again.stdout                # the second run starts from the file
    assert result_line(again)["wide"] == result["wide"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_help_lists_the_flags(tmp_path):
    assert "--sft-steps" in run_script("01_flow_policy.py", "--help", cwd=tmp_path).stdout
