"""01: flow matching against closed forms, the toy world against a scalar replay of its rules."""

import argparse
import importlib
import math
import tempfile

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

from conftest import (MixtureFlow, Opaque, Scripted, expert_plan, one_clear_line, result_line,
                      run_main, run_process, run_script, wrong_call)

from envs import gap_world
from tools import flags

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


def test_noise_is_independent_in_every_row_action_and_dimension():
    policy = flow.FlowPolicy(3, 2, state_dim=1)
    x_1 = flow.noise_like_chunks(policy, states(4000))
    assert x_1.shape == (4000, 3, 2) and x_1.dtype == torch.float32
    assert stats.kstest(x_1.flatten(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(x_1.flatten(1).T) - np.eye(6)).max() < 0.07
    assert len(x_1[:, 0, 0].unique()) > 3900


def test_noise_asks_any_kind_of_observation_for_its_rows():
    policy, pictures = flow.FlowPolicy(3, 2, state_dim=1), torch.zeros(7, 1, 3, 8, 8).byte()
    assert flow.noise_like_chunks(policy, {"rgb": pictures}).shape == (7, 3, 2)


class Wrapped(nn.Module):
    """A policy whose context is what `wrap` makes of it; it counts its calls."""

    def __init__(self, policy, wrap):
        super().__init__()
        self.policy, self.wrap, self.calls = policy, wrap, []
        self.horizon, self.action_dim = policy.horizon, policy.action_dim
        self.denormalise = policy.denormalise

    def encode(self, obs):
        self.calls.append("encode")
        self.plain = self.policy.encode(obs)
        self.ctx = self.wrap(self.plain)
        return self.ctx

    def velocity(self, x_t, t, ctx):
        assert ctx is self.ctx
        self.calls.append("velocity")
        return self.policy.velocity(x_t, t, self.plain)


WRAPS = {"tuple": lambda ctx: (ctx, "words"), "object": Opaque, "dict": lambda ctx: {"cache": ctx}}


@pytest.mark.parametrize("kind", WRAPS)
def test_sampling_and_evaluation_never_look_into_the_context(kind):
    policy = flow.FlowPolicy(4, 2, state_dim=3)
    wrapped, x_1, obs = Wrapped(policy, WRAPS[kind]), torch.randn(5, 4, 2), {
        "state": torch.randn(5, 3)}
    torch.testing.assert_close(flow.ode_sample(wrapped, obs, 4, x_1),
                               flow.ode_sample(policy, obs, 4, x_1))
    assert wrapped.calls == ["encode"] + ["velocity"] * 4
    np.testing.assert_array_equal(flow.evaluate(wrapped, gap_world.GapWorld(), range(20)),
                                  flow.evaluate(policy, gap_world.GapWorld(), range(20)))


def test_the_start_noise_is_standard_normal():
    x_1 = flow.ode_path(PointMass(), states(5000), 1)[:, 0]
    assert stats.kstest(x_1.flatten(), "norm").pvalue > 1e-3


def test_sft_learns_both_modes_and_their_proportions():
    """One action; 30 % of the demos say -1, 70 % say +1 (std 0.1). A regression would say 0.4."""
    torch.manual_seed(0)
    left = torch.rand(4000) < 0.3
    chunks = (torch.where(left, -1.0, 1.0) + 0.1 * torch.randn(4000))[:, None, None]
    policy = flow.FlowPolicy(1, 1, state_dim=1, width=64)
    flow.train_sft(policy, states(4000), chunks, steps=800, lr=3e-3)
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


# ------------------------------------------------------------------------------------------------
# The policy: normalisation, context, shapes


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


def test_a_state_far_outside_the_demos_is_cut_at_five_stds():
    policy, obs, _ = fitted()
    far = {"state": torch.tensor([[1e6, 7.0], [-1e6, 7.0], [5 + 3 * 4.0, 7.0]])}
    ctx = policy.encode(far)[:, 0]
    assert ctx[:2].tolist() == [5, -5] and ctx[2].item() == pytest.approx(4, abs=0.5)


def test_a_state_dict_holds_weights_and_normalisation():
    policy, obs, _ = fitted()
    loaded = flow.FlowPolicy(3, 4, state_dim=2)
    loaded.load_state_dict(policy.state_dict())
    x_t, t = torch.randn(500, 3, 4), torch.rand(500)
    torch.testing.assert_close(loaded.velocity(x_t, t, loaded.encode(obs)),
                               policy.velocity(x_t, t, policy.encode(obs)), rtol=0, atol=0)
    torch.testing.assert_close(loaded.denormalise(x_t), policy.denormalise(x_t), rtol=0, atol=0)


def test_the_state_changes_the_velocity_of_its_own_row_only():
    policy, obs = flow.FlowPolicy(4, 3, state_dim=5), {"state": torch.randn(6, 5)}
    x_t, t = torch.randn(6, 4, 3), torch.rand(6)
    v = policy.velocity(x_t, t, policy.encode(obs))
    obs["state"][2] += 1
    moved = (policy.velocity(x_t, t, policy.encode(obs)) - v).abs().amax((1, 2)) > 1e-5
    assert moved.tolist() == [False, False, True, False, False, False]


def test_the_velocity_depends_on_time():
    policy, x_t = flow.FlowPolicy(4, 3, state_dim=5), torch.randn(1, 4, 3)
    ctx = policy.encode({"state": torch.randn(1, 5)})
    v = [policy.velocity(x_t, torch.tensor([t]), ctx) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert all((a - b).abs().max() > 1e-5 for i, a in enumerate(v) for b in v[:i])


def test_wrong_shapes_are_named():
    policy = flow.FlowPolicy(4, 2, state_dim=1)
    ctx = policy.encode(states(3))
    with pytest.raises(AssertionError, match="x_t has shape"):
        policy.velocity(torch.zeros(3, 2, 4), torch.zeros(3), ctx)
    with pytest.raises(AssertionError, match=r"expected \(1, 4, 2\)"):            # t too short
        policy.velocity(torch.zeros(3, 4, 2), torch.zeros(1), ctx)


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
    return 0.97 * expert_plan(state, horizon).astype(float) + clumsiness * shake


@pytest.mark.parametrize("horizon", [1, 4, 5])
def test_gap_world_moves_by_the_rules(horizon):
    """400 episodes, from careful to wild: outcome, executed counts and positions of every chunk."""
    world, outcomes = gap_world.GapWorld(), set()
    obs = world.reset(range(400))
    start, gap_y, clumsiness = world.position.copy(), world.gap_y.copy(), np.linspace(0, 2.5, 400)
    actions, played, ended = [[] for _ in range(400)], np.zeros(400, int), np.zeros(400, bool)
    while not ended.all():
        chunk = clumsy(obs["state"].numpy(), horizon, clumsiness[:, None, None])
        obs, executed = world.step(chunk)
        assert obs["state"].dtype == torch.float32 and obs["state"].shape == (400, 3)
        for i in np.flatnonzero(~ended):
            actions[i] += list(chunk[i].astype(float))
            outcome, steps, trail = replay(world, start[i], gap_y[i], actions[i])
            assert executed[i] == steps - played[i]
            assert world.success[i] == (outcome == "success")
            assert world.over[i] == (outcome != "running")
            np.testing.assert_allclose(obs["state"][i], [*trail[-1], gap_y[i]], atol=1e-6)
            played[i] = steps
            outcomes.add(outcome)
        ended |= world.over
    assert outcomes >= {"success", "crash", "timeout"}


def test_a_finished_robot_rests_where_it_ended_and_keeps_its_outcome():
    world = gap_world.GapWorld()
    obs = world.reset(range(30))
    for _ in range(world.max_steps):
        before, over, success = world.observe()["state"], world.over.copy(), world.success.copy()
        obs, executed = world.step(clumsy(obs["state"].numpy(), 4, 1.5))
        np.testing.assert_array_equal(obs["state"][over], before[over])
        assert not executed[over].any()
        np.testing.assert_array_equal(world.success[over], success[over])
    assert over.all() and (before[:, 0] > 0.7).any() and 0 < success.sum() < 30


def test_a_crash_on_the_very_last_step_is_a_crash():
    world = gap_world.GapWorld()
    world.reset([0])
    world.position[:], world.gap_y[:], world.steps[:] = [-0.05, 0.5], 0, world.max_steps - 1
    obs, executed = world.step(np.array([[[1.0, 0.0]]]))
    assert world.over[0] and not world.success[0] and executed.tolist() == [1]
    assert obs["state"].tolist() == [[0, 0.5, 0]]


def test_starts_fill_their_range_evenly():
    for width in (0.3, 0.9):
        state = gap_world.GapWorld(width).reset(range(2000))["state"]
        assert (state[:, 0] == np.float32(-0.8)).all()
        assert stats.kstest(state[:, 1], stats.uniform(-width, 2 * width).cdf).pvalue > 1e-3
        assert stats.kstest(state[:, 2], stats.uniform(-0.3, 0.6).cdf).pvalue > 1e-3
        assert abs(np.corrcoef(state[:, 1], state[:, 2])[0, 1]) < 0.08


def test_a_seed_starts_the_same_episode_in_any_company_and_after_any_other():
    world = gap_world.GapWorld()
    together = world.reset([11, 22, 33, 44, 55])["state"]
    np.random.rand(3)
    world.step(np.ones((5, 4, 2)))
    for alone in (world, gap_world.GapWorld()):
        np.testing.assert_array_equal(together[2], alone.reset([33])["state"][0])
    assert len(np.unique(together[:, 1])) == 5


@pytest.mark.parametrize("width", [0.3, 0.9])
@pytest.mark.parametrize("horizon", [1, 4])
def test_the_expert_succeeds_from_everywhere(width, horizon):
    def act(obs):
        return torch.from_numpy(expert_plan(obs["state"].numpy(), horizon)), {}

    assert gap_world.GapWorld(width).play(act, range(1000))[0].all()


def test_a_chunk_of_a_demo_is_its_next_actions_with_the_last_one_repeated():
    chunks = flow.sliding_chunks(torch.tensor([[0, 10], [1, 11], [2, 12]]), horizon=4)
    assert chunks[..., 0].tolist() == [[0, 1, 2, 2], [1, 2, 2, 2], [2, 2, 2, 2]]
    assert torch.equal(chunks[..., 1], chunks[..., 0] + 10)


def toy_chunks(num_demos, seed):
    """What the toy policy is cloned from -> (obs, chunks), seen where it is handed over."""
    seen = []
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(flow, "train_sft", lambda policy, *data: seen.append(data) or 0.0)
        flow.toy_policy(seed, num_demos, folder=folder)
    (obs, chunks, steps), = seen
    assert steps == 3000
    return obs, chunks


def test_demos_are_the_experts_next_actions_from_narrow_starts():
    obs, chunks = toy_chunks(6, seed=3)
    state = obs["state"].numpy()
    starts = np.flatnonzero(state[:, 0] == np.float32(-0.8))
    assert len(starts) == 6 and (np.abs(state[starts, 1]) <= 0.3).all()
    assert chunks.shape == (len(state), 4, 2)
    for first, end in zip(starts, [*starts[1:], len(state)]):
        taken = [gap_world.expert_action(s[None])[0] for s in state[first:end]]
        for i in range(end - first):
            expected = [taken[min(i + h, len(taken) - 1)] for h in range(4)]
            np.testing.assert_allclose(chunks[first + i], expected, atol=1e-6)


def test_demos_are_repeatable_and_differ_from_seed_to_seed():
    starts = [toy_chunks(3, seed)[0]["state"][:3] for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


# ------------------------------------------------------------------------------------------------
# play and evaluate


class Diary(gap_world.GapWorld):
    """A GapWorld that writes down the chunks it was given."""

    def __init__(self, *args):
        super().__init__(*args)
        self.chunks = []

    def step(self, chunks):
        self.chunks.append(chunks)
        return super().step(chunks)


def play_clumsily(seeds, horizon=4):
    world = Diary()

    def act(obs):
        actions = torch.from_numpy(clumsy(obs["state"].numpy(), horizon, 1.2))
        return actions, {"actions": actions, "double": 2 * obs["state"]}

    return world, *world.play(act, seeds)


def test_one_success_per_seed_and_rows_of_every_episode():
    _, success, rows = play_clumsily([100 + 3 * i for i in range(40)])
    assert success.shape == (40,) and success.dtype == bool and 0 < success.sum() < 40
    assert set(rows) == {"state", "episode", "mask", "actions", "double"}
    assert all(isinstance(values, torch.Tensor) for values in rows.values())
    assert len({len(values) for values in rows.values()}) == 1
    assert sorted(set(rows["episode"].tolist())) == list(range(40))
    torch.testing.assert_close(rows["double"], 2 * rows["state"])  # recorded beside its own row


def test_an_episode_is_the_same_alone_and_in_company():
    _, success_all, rows_all = play_clumsily(range(40))
    for e in range(40):
        _, success, rows = play_clumsily([e])
        mine = rows_all["episode"] == e
        assert success.tolist() == [success_all[e]] and not rows["episode"].any()
        for key in ("mask", "actions", "state"):
            assert torch.equal(rows[key], rows_all[key][mine])


@pytest.mark.parametrize("horizon", [1, 4, 5])
def test_rows_hold_what_a_scalar_replay_of_each_episode_sees(horizon):
    """The observation at the start of each chunk, and a mask that ends where the episode does."""
    world, success, rows = play_clumsily(range(40), horizon)
    ends_inside = 0
    for e in range(40):
        mine, own = rows["episode"] == e, gap_world.GapWorld()
        own.reset([e])
        actions = rows["actions"][mine].flatten(0, 1).double().numpy()
        outcome, steps, trail = replay(own, own.position[0], own.gap_y[0], actions)
        mask = rows["mask"][mine].flatten()
        assert success[e] == (outcome == "success")
        assert mask.tolist() == [i < steps for i in range(len(actions))]
        assert len(actions) - horizon < steps <= len(actions)          # no chunk after the end
        np.testing.assert_allclose(rows["state"][mine][:, :2], trail[:-1][::horizon], atol=1e-6)
        np.testing.assert_allclose(world.position[e], trail[-1], atol=1e-6)
        ends_inside += not mask[-1]
    assert ends_inside > 10 or horizon == 1


def test_evaluate_repeats_itself_and_leaves_the_random_stream_alone():
    policy, before = flow.FlowPolicy(4, 2, state_dim=3), torch.random.get_rng_state()
    policy.action_scale.fill_(0.5)
    first, again = Diary(), Diary()
    success = flow.evaluate(policy, first, range(20))
    assert success.shape == (20,) and success.dtype == bool
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(5)                                   # whatever ran before
    np.testing.assert_array_equal(flow.evaluate(policy, again, range(20)), success)
    np.testing.assert_array_equal(first.chunks[0], again.chunks[0])


def test_evaluate_acts_with_the_ode_in_environment_units():
    """A foreign policy that plays the expert succeeds; one that denormalises wrongly does not."""
    policy = Scripted(lambda state: expert_plan(state, 4), 4)
    assert flow.evaluate(policy, gap_world.GapWorld(0.3), range(50)).all()
    policy.denormalise = lambda x_0: -x_0
    assert not flow.evaluate(policy, gap_world.GapWorld(0.3), range(50)).any()


@pytest.mark.parametrize("num_steps", [1, 3, 7])
def test_evaluate_takes_as_many_euler_steps_as_asked(num_steps):
    policy, times, diary = Scripted(lambda s: expert_plan(s, 4), 4), [], Diary(0.3)
    velocity = policy.velocity
    policy.velocity = lambda x_t, t, ctx: times.append(t[0].item()) or velocity(x_t, t, ctx)
    flow.evaluate(policy, diary, range(3), num_steps)
    expected = [1 - k / num_steps for k in range(num_steps)] * len(diary.chunks)
    np.testing.assert_allclose(times, expected, atol=1e-6)


def test_evaluate_drives_any_world_that_offers_play():
    """Only play(act, seeds) is asked of it; the last of three seeds succeeds."""
    class World:
        def play(self, act, seeds):
            assert list(seeds) == [7, 8, 9]
            actions, record = act({"state": torch.zeros(2, 3)})
            assert actions.shape == (2, 4, 2) and record == {} and not actions.requires_grad
            return np.array([False, False, True]), {}

    success = flow.evaluate(flow.FlowPolicy(4, 2, state_dim=3), World(), range(7, 10))
    assert success.tolist() == [False, False, True]


def test_take_picks_the_same_rows_of_every_tensor():
    obs = {"state": torch.arange(4)[:, None], "tokens": torch.arange(8).view(4, 2)}
    rows = flow.take(obs, torch.tensor([3, 1]))
    assert rows["state"].flatten().tolist() == [3, 1]
    assert rows["tokens"].tolist() == [[6, 7], [2, 3]]
    assert flow.take(obs, torch.tensor([True, False, False, True]))["state"].tolist() == [[0], [3]]


# ------------------------------------------------------------------------------------------------
# The script


def test_the_script_trains_saves_and_reports(tmp_path):
    flags = ("--sft-steps", 10, "--num-demos", 2, "--episodes", 8, "--out", tmp_path / "out")
    done = run_script("01_flow_policy.py", *flags, cwd=tmp_path)
    result = result_line(done)
    assert 0 <= result["wide"] <= 1 and 0 <= result["narrow"] <= 1 and result["episodes"] == 8
    checkpoint, = (tmp_path / "out").glob("*.pt")
    policy = flow.FlowPolicy(4, 2, state_dim=3)
    policy.load_state_dict(torch.load(checkpoint, weights_only=True))
    test = gap_world.episode_seeds("test", 8)
    rate = flow.evaluate(policy, gap_world.GapWorld(), test).mean()
    assert rate == pytest.approx(result["wide"], abs=1e-3)
    assert (tmp_path / "out" / "flow_policy.png").stat().st_size > 1000
    assert "was missing" in done.stdout
    _, again, _ = run_main("01_flow_policy.py", *flags)
    assert "was missing" not in again                      # the second run starts from the file
    assert done.stdout.splitlines()[-1].split()[:4] == again.splitlines()[-1].split()[:4]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_help_lists_every_flag_with_its_default():
    code, told, _ = run_main("01_flow_policy.py", "--help")
    flags = ("--seed", "--num-demos", "--sft-steps", "--num-steps", "--episodes", "--out")
    assert code == 0 and all(flag in told for flag in flags)
    assert "".join(told.split()).count("(default:") == len(flags)


@pytest.mark.parametrize("flags", [
    "--num-steps 0", "--num-steps -3", "--num-steps 1.5", "--episodes 0", "--episodes many",
    "--sft-steps 0", "--num-demos 0", "--num-demos -1", "--seed -1", "--seed x", "--seed 0.5",
    "--out a_file", "--out a_file/out"])
def test_a_value_that_cannot_work_is_told_in_one_line_that_names_the_flag(flags):
    line = wrong_call("01_flow_policy.py", *flags.split())
    assert flags.split()[0] in line and flags.split()[1] in line


@pytest.mark.parametrize("flags", ["--sft 100", "--epis 10", "--batch-size 3", "--num-envs 3"])
def test_unknown_and_shortened_flags_are_refused(flags):
    assert flags.split()[0] in wrong_call("01_flow_policy.py", *flags.split())


def test_a_wrong_call_ends_with_exit_status_2(tmp_path):
    done = run_process("01_flow_policy.py", "--num-steps", 0, cwd=tmp_path, ok=False)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert "--num-steps" in one_clear_line(done)


@pytest.mark.parametrize("kind, low, high, good, bad", [
    (int, 1, 9, ["1", "9"], ["0", "10", "-1", "1.0", "x", "", "nan"]),
    (float, 0, 1, ["0", "1", "0.5", "1e-3"], ["-0.1", "1.1", "nan", "inf", "-inf", "half"]),
    (float, 2, math.inf, ["2", "1e300"], ["1.9", "inf", "nan"])])
def test_a_number_is_finite_and_within_its_limits(kind, low, high, good, bad):
    check = flags.number(kind, low, high)
    assert [check(text) for text in good] == [kind(text) for text in good]
    for text in bad:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            check(text)


def test_seeds_of_two_splits_never_meet_and_any_run_seed_is_legal():
    """The last two bits tell demo, validation, test and training apart, whatever the run."""
    drawn = {split: np.concatenate([gap_world.episode_seeds(split, 2000, seed, iteration)
                                    for seed in (0, 1, 7, 8, 123456789) for iteration in (0, 1)])
             for split in ("demo", "validation", "test", "train")}
    for split, seeds in drawn.items():
        assert seeds.min() >= 0 and seeds.max() < 2**31
        assert len(set(seeds.tolist())) > 0.999 * len(seeds)
        assert all(not set(seeds.tolist()) & set(other.tolist())
                   for name, other in drawn.items() if name != split)
    first = gap_world.episode_seeds("train", 5, 3, 2)
    assert np.array_equal(first, gap_world.episode_seeds("train", 9, 3, 2)[:5])   # more of the same
    with pytest.raises(ValueError):
        gap_world.episode_seeds("holdout", 1)
