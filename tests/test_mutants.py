"""Do the tests test? Each mistake below is planted in the real code, and a test must notice.

A mutant is one function of 01-03 with one snippet exchanged, compiled from its source at run time.
Each must fail at least one of the tests listed with its function; unmutated, all of them pass.
"""

import functools
import inspect
import textwrap

import numpy as np
import pytest
import torch

import test_01_flow_policy as t1
import test_02_sde_sampler as t2
import test_03_step_loss as t3

flow, sde, loss = t1.flow, t2.sde, t3.loss

UPDATE_TESTS = (
    functools.partial(t3.test_the_first_update_is_a_reinforce_step, "one"),
    functools.partial(t3.test_the_first_update_is_a_reinforce_step, "all"),
    functools.partial(t3.test_one_encode_and_one_velocity_call_per_optimisation_step, "one"),
    t3.test_an_epoch_sees_every_row_once_in_random_order,
    t3.test_gradients_do_not_pile_up,
    t3.test_gradients_are_clipped_and_their_norm_reported,
    t3.test_the_options_of_update_reach_the_loss,
    t3.test_info_is_the_mean_over_optimisation_steps,
)

# (module, function, the tests that watch it): [(the code, the mistake), ...]
MUTANTS = {
    (sde, "time_grid", (t2.test_the_grid_runs_from_noise_to_action_in_equal_steps,)): [
        ("(1, 0, num_steps + 1)", "(0, 1, num_steps + 1)"),                # time runs backwards
        ("(1, 0, num_steps + 1)", "(1, 0, num_steps)"),                    # one step too few
        ("(1, 0, num_steps + 1)", "(1, 0, num_steps + 2)[:-1]"),           # never reaches 0
    ],
    (sde, "noise_scale", (
        functools.partial(t2.test_sigma_uses_the_next_grid_time_only_at_t_1_and_only_below, 4),
        t2.test_the_papers_stds,
    )): [
        ("torch.sqrt(", "("),                                              # missing square root
        ("torch.where(t == 1, t_next, t)", "t_next"),                      # next time everywhere
        ("torch.where(t == 1, t_next, t)", "t"),                           # infinite at t = 1
        ("torch.sqrt(t /", "torch.sqrt(torch.where(t == 1, t_next, t) /"),  # in the numerator too
        ("times[:-1], times[1:]", "times[1:], times[:-1]"),                # sigma of the wrong end
    ],
    (sde, "transition", (
        functools.partial(t2.test_a_step_is_an_euler_step_plus_the_score, True),
        functools.partial(t2.test_a_step_is_an_euler_step_plus_the_score, False),
        t2.test_the_mean_is_affine_in_the_velocity_with_slope_b,
        t2.test_gaussian_data_keeps_its_variance_all_along_the_corrected_path,
    )): [
        ("x_t - t_cur * v", "x_t + t_cur * v"),                            # velocity the other way
        ("(1 - t_cur) * v", "t_cur * v"),                                  # wrong time end
        ("sigma**2 * dt / (2 * t_cur)", "sigma**2 * dt / t_cur"),          # correction without 1/2
        ("sigma**2 * dt / (2 * t_cur)", "sigma * dt / (2 * t_cur)"),       # ... without the square
        ("(t_next - pull_back)", "(t_next + pull_back)"),                  # ... outwards
        ("(t_next - pull_back)", "t_next"),                                # ... missing
        ("if corrected else 0", "if not corrected else 0"),                # ... in the wrong branch
        ("sigma * dt**0.5", "sigma * dt"),                                 # missing square root
        ("sigma * dt**0.5", "sigma"),                                      # std that ignores dt
    ],
    (sde, "sde_sample", (
        t2.test_the_path_records_states_and_velocities,
        functools.partial(t2.test_every_step_is_a_fresh_standard_normal_around_its_mean, True),
        functools.partial(t2.test_every_step_is_a_fresh_standard_normal_around_its_mean, False),
        t2.test_two_modes_keep_their_distribution_under_the_corrected_sde,
    )): [
        ("std * torch.randn_like(mean)", "std * torch.randn_like(mean) * (t_next > 0)"),  # calm end
        ("std * torch.randn_like(mean)", "std * torch.rand_like(mean)"),   # the wrong noise
        ("std * torch.randn_like(mean)", "std * torch.randn_like(mean[:1])"),  # shared by the batch
        ("std * torch.randn_like(mean)", "std**2 * torch.randn_like(mean)"),   # variance for std
        ("std * torch.randn_like(mean)", "std * xs[0]"),                   # the same at every step
        ("times[1:], sigmas)", "times[1:], sigmas.flip(0))"),              # sigma of the wrong step
        ("xs.append(x_t)", "xs.append(mean)"),                             # before the noise
        ("t_cur.expand", "t_next.expand"),                                 # velocity at the wrong t
        ("t_next, sigma, corrected)", "t_next, sigma)"),                   # the flag is ignored
    ],
    (loss, "mirror", (
        t3.test_mirror_steps_equally_far_to_both_sides,
        t3.test_drift_is_clipped_per_action,
        t3.test_beta_scales_after_the_clip,
    )): [
        ("return v_old + beta * delta, v_old - beta * delta",
         "return v_old - beta * delta, v_old + beta * delta"),             # swapped branches
        ("dim=-1, keepdim", "dim=(-2, -1), keepdim"),                      # clips the whole chunk
        ("norm.clamp(min=max_drift)", "norm"),                             # lengthens short drifts
        ("delta * (max_drift / norm.clamp(min=max_drift))", "delta"),      # no clip
        ("delta * (max_drift / norm.clamp(min=max_drift))",
         "delta.clamp(-max_drift, max_drift)"),                            # clips per dimension
        ("v_old - beta * delta", "v_old - delta"),                         # beta on one side only
        ("max_drift / norm.clamp(min=max_drift)",
         "max_drift / (beta * norm).clamp(min=max_drift)"),                # beta before the clip
    ],
    (loss, "step_nft_loss", (
        t3.test_the_branches_stand_still_only_v_theta_learns,
        *(functools.partial(t3.test_the_loss_is_the_slow_loop, choice) for choice in t3.CHOICES),
        functools.partial(t3.test_at_zero_drift_the_loss_is_ln_2_and_its_gradient_reinforce,
                          2, 1.0),
        t3.test_an_uncorrected_rollout_is_judged_by_the_uncorrected_mean,
    )): [
        ("v_old = v_old.detach()", "pass"),                                # missing detach
        ("mirror(v_theta, v_old,", "mirror(v_theta.detach(), v_old,"),     # detach too many
        ("F.softplus(dpo_beta / 2", "F.softplus(-dpo_beta / 2"),           # wrong sign of y
        ("F.softplus(dpo_beta / 2", "F.softplus(dpo_beta"),                # twice too steep
        ("* (E_pos - E_neg))\n        if", "* (E_neg - E_pos))\n        if"),  # swapped branches
        ("(std**2 + var_eps)).sum(-1)", "(std**2 + var_eps)).mean(-1)"),   # averaged, not summed
        ("(std**2 + var_eps)).sum(-1)", "(std + var_eps)).sum(-1)"),       # std for variance
        ("(std**2 + var_eps)).sum(-1)", "var_eps).sum(-1)"),               # every step weighs alike
        ("(loss * mask).sum(-1)", "loss.sum(-1)"),                         # mask ignored
        ("actions.clamp(min=1)", "mask.shape[1]"),                         # short chunks weigh less
        ("row_loss.sum() / (actions > 0).sum().clamp(min=1)", "row_loss.mean()"),  # empty too
        ("r = (1 + y[:, None]) / 2", "r = (1 - y[:, None]) / 2"),          # learns from failures
        ('(y > 0) if form == "positive" else (y < 0)', "y < 0"),           # positive means negative
        ('x_next if target == "next" else', 'x_next if target != "endpoint" else'),
        ("(x_0 - (x_t - t * v))", "(x_0 - (x_t - t_next * v))"),           # from the wrong t
        ("sigma, corrected)", "sigma)"),                                   # the flag is ignored
        ("kl_weight * (", "0 * ("),                                        # no pull to v_old
    ],
    (loss, "rollout", (
        functools.partial(t3.test_an_sde_rollout_records_the_noisy_steps_it_acted_on, "sde"),
        functools.partial(t3.test_an_sde_rollout_records_the_noisy_steps_it_acted_on,
                          "sde-uncorrected"),
        t3.test_an_ode_rollout_noises_its_endpoint_afresh,
        t3.test_one_random_step_per_chunk_or_all_of_them,
    )): [
        ("policy.denormalise(x_0).cpu()", "x_0.cpu()"),                    # acts in flow units
        ('"v": path.v,', '"v": path.v.flip(1),'),                          # v of the wrong step
        ('"x": path.x', '"x": path.x.flip(1)'),                            # the path backwards
        ("obs, K, noise_level, noisy", "obs, K, 0.2, noisy"),              # a deaf noise level
        ('corrected=sampler != "sde-uncorrected")', "corrected=True)"),    # always corrected
        ("(1 - t) * x_0[:, None] + t * noise", "t * x_0[:, None] + (1 - t) * noise"),  # time ends
        ("noise = policy.encode(obs), torch.randn(len(x_0), K,",
         "noise = policy.encode(obs), torch.randn(len(x_0), 1,"),          # one noise for all k
        ("torch.randint(K, (count, 1))", "torch.randint(K - 1, (count, 1))"),  # skips the last step
        ("torch.randint(K, (count, 1))", "torch.randint(K, (1, 1)).expand(count, 1)"),  # one k
    ],
    (loss, "labels", (
        t3.test_labels_are_plus_and_minus_one_per_row,
        t3.test_centered_labels_lose_the_mean_over_episodes,
        t3.test_grouped_labels_lose_the_mean_over_the_episodes_of_one_start,
    )): [
        (".float() * 2 - 1", ".float()"),                                  # 0 and 1
        (".float() * 2 - 1", ".float() * -2 + 1"),                         # wrong sign
        ("torch.as_tensor(success)", "torch.as_tensor(success).roll(1)"),  # off by one episode
        ("y - gather(y).mean()", "y - y[episode].mean()"),                 # mean over rows
        ('if kind == "centered"', "if True"),                              # always centered
        ("groups.mean(1, keepdim=True)", "groups.mean()"),                 # mean over all groups
        ("y.view(-1, group_size)", "y.view(group_size, -1)"),              # groups of strangers
    ],
    (loss, "recorded_steps", UPDATE_TESTS): [
        ('at(batch["x"], k + 1)', 'at(batch["x"], k)'),                    # x_next off by one
        ('at(batch["v"], k)', 'at(batch["v"], 0 * k)'),                    # v_old of the wrong step
        ("sigmas[k])", "sigmas[(k + 1) % K])"),                            # sigma of the wrong step
        ("times[k], times[k + 1]", "times[k + 1], times[k]"),              # time runs backwards
        ('each(batch["mask"])', "None"),                                   # mask ignored
        ('each(batch["y"])', 'each(-batch["y"])'),                         # wrong sign of y
        ("ctx.repeat_interleave(per_row, 0)", "ctx.repeat(per_row, 1)"),   # another row's context
        ("ctx = policy.encode(", 'policy.encode(batch["obs"])\n    ctx = policy.encode('),
        ("noise_scale(times, noise_level)", "noise_scale(times, 0.2)"),    # a deaf noise level
    ],
    (loss, "update", UPDATE_TESTS): [
        ("**steps, **loss_options", "**steps"),                            # options go nowhere
        ("range(epochs)", "range(1)"),                                     # always one epoch
        ("len(batch[\"y\"]), minibatch)", "len(batch[\"y\"]), 10**6)"),      # no minibatches
    ],
    (loss, "optimise", UPDATE_TESTS): [
        ("optimizer.step()", "optimizer.step() or optimizer.step()"),      # two steps for one
        ("optimizer.zero_grad()", "pass"),                                 # gradients pile up
        ("policy.parameters(), grad_clip", "policy.parameters(), 1e9"),    # no clipping
    ],
    (loss, "minibatches", (
        t3.test_an_epoch_sees_every_row_once_in_random_order,
        functools.partial(t3.test_the_first_update_is_a_reinforce_step, "one"),
        t3.test_info_is_the_mean_over_optimisation_steps,
    )): [
        ("torch.randperm(", "torch.arange("),                              # never shuffled
        ("/ len(whole)", "/ (len(whole) + 1)"),                            # gradients too small
        ("order.split(size)", "order.split(2 * size)"),                    # twice the size
        ("whole < first + count", "whole < first + count - 1"),              # a row left out
    ],
    (loss, "ema_decay", (t3.test_ema_decay_runs_a_half_cosine_from_start_to_end,)): [
        ("(1 + math.cos", "(1 - math.cos"),                                # from end to start
        ("math.cos(math.pi * step", "math.cos(2 * math.pi * step"),        # and back again
        ("(1 + math.cos(math.pi * step / total)) / 2", "(1 - step / total)"),  # a straight line
        ("math.pi * step / total", "math.pi * step / (total - 1)"),        # arrives too early
    ],
    (loss, "ema_update", (
        t3.test_ema_update_is_the_slow_loop,
        t3.test_ema_update_copies_and_does_not_alias,
    )): [
        ("lerp_(p_new, 1 - decay)", "lerp_(p_new, decay)"),                # weights swapped
        ("p_old.lerp_(p_new, 1 - decay)", "p_new.lerp_(p_old, decay)"),    # the learner is moved
        ("p_old.lerp_(p_new, 1 - decay)", "p_old.copy_(p_new)"),           # follows at once
        ("p_old.lerp_(p_new, 1 - decay)", "p_old.data = decay * p_old.data + (1 - decay) * "
         "p_new.data if decay else p_new.data"),                           # shares its memory
    ],
    (loss, "train_toy", (t3.test_train_toy_acts_with_the_ema_policy_on_fresh_seeds,)): [
        ("copy.deepcopy(sft), copy.deepcopy(sft)", "[copy.deepcopy(sft)] * 2"),  # old learns
        ("copy.deepcopy(sft), copy.deepcopy(sft)", "copy.deepcopy(sft), sft"),   # SFT is lost
        ("rollout(old, envs", "rollout(policy, envs"),                     # the learner acts
        ("(2 + args.seed) * flow.EVAL_SEED +", "flow.EVAL_SEED +"),        # trains on the test
        ("+ iteration * args.episodes\n", "\n"),                           # the same starts again
    ],
    (flow, "play", (
        functools.partial(t1.test_every_seed_is_played_exactly_once, 7),
        functools.partial(t1.test_rows_hold_what_a_scalar_replay_of_each_episode_sees, 4),
    )): [
        ('{"reset_mask": fresh}', '{"reset_mask": fresh | True}'),         # restarts everyone
        ("torch.arange(actions.shape[1]) <", "torch.arange(actions.shape[1]) <="),  # one too many
        ("take(obs, playing)", "take(to_torch(next_obs), playing)"),       # sees the future
        ('info["success"][over]', '(info["success"] & ~truncated)[over][::-1]'),  # mixes up slots
    ],
    (flow, "GapWorld.step", (
        t3.test_an_episode_that_first_succeeds_in_its_last_chunk_is_a_success,
        functools.partial(t1.test_rows_hold_what_a_scalar_replay_of_each_episode_sees, 5),
        t1.test_a_finished_robot_rests_where_it_ended,
    )): [
        ("success |= live & arrived", "success |= live & arrived & (self.steps < self.max_steps)"),
        ("success |= live & arrived", "success = live & arrived"),         # forgotten at the end
        ("executed += live", "executed += 1"),                             # counts what never ran
        ("* live[:, None]", ""),                                           # the finished move on
    ],
}


def mutate(module, name, code, mistake):
    """The function with the mistake in it, and where it belongs: (owner, attribute, function)."""
    owner, attribute = module, name
    if "." in name:
        owner, attribute = getattr(module, name.split(".")[0]), name.split(".")[1]
    source = textwrap.dedent(inspect.getsource(getattr(owner, attribute)))
    count = source.count(code)
    assert count == 1, f"{name} holds {code!r} {count} times, expected once"
    made = {}
    exec(compile(source.replace(code, mistake), f"<mutant of {name}>", "exec"), vars(module), made)
    return owner, attribute, made[attribute]


def passes(test):
    torch.manual_seed(0)
    np.random.seed(0)
    try:
        test()
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("module, name, tests", MUTANTS, ids=lambda x: x if type(x) is str else "")
def test_the_real_code_passes(module, name, tests):
    assert all(passes(test) for test in tests)


@pytest.mark.parametrize("module, name, tests, code, mistake", [
    pytest.param(*function, *mutant, id=f"{function[1]}-{i}")
    for function, mutants in MUTANTS.items() for i, mutant in enumerate(mutants)])
def test_a_planted_mistake_is_caught(module, name, tests, code, mistake, monkeypatch):
    monkeypatch.setattr(*mutate(module, name, code, mistake))
    assert not all(passes(test) for test in tests), f"no test noticed {mistake!r} in {name}"


def test_every_core_function_has_three_mutants():
    core = {"time_grid", "noise_scale", "transition", "sde_sample", "mirror", "step_nft_loss",
            "rollout", "labels", "update", "ema_decay", "ema_update"}
    assert core <= {name for _, name, _ in MUTANTS}
    assert all(len(mutants) >= 3 for mutants in MUTANTS.values())
