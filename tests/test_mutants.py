"""Do the tests test? Each mistake below is planted in the real code, and a test must notice.

A mutant is one function of 01-03, 05 or of envs with one snippet exchanged, compiled from
its source at run time. Each must fail at least one of the tests listed with its function;
unmutated, all of them pass.
"""

import functools
import inspect
import textwrap

import pytest

from conftest import seed_all
from envs import gap_world
import test_01_flow_policy as t1
import test_02_sde_sampler as t2
import test_03_step_loss as t3
import test_05_train_maniskill as t5
import test_envs_workers as tw

flow, sde, loss, compare, workers = t1.flow, t2.sde, t3.loss, t5.mani, tw.workers
partial = functools.partial

LOSS_TESTS = (
    t3.test_the_branches_stand_still_only_v_theta_learns,
    *(partial(t3.test_the_loss_is_the_slow_loop, choice) for choice in t3.CHOICES),
    partial(t3.test_at_zero_drift_the_loss_is_ln_2_and_its_gradient_reinforce, k=2, y=1.0, H=4,
            executed=3, beta=0.7, dpo_beta=1.0),
    partial(t3.test_the_branches_differ_by_minus_4_beta_e_d_over_var, k=1, y=-1.0),
    t3.test_the_metrics_mean_what_they_say,
)
ERROR_TESTS = tuple(
    partial(t3.test_an_error_is_the_slow_loop_action_by_action_and_so_is_its_gradient,
            error=error, var_eps=eps)
    for error in t3.ERRORS for eps in (1e-4, 0.1))
UPDATE_TESTS = (
    t3.test_recorded_steps_are_read_off_the_path_row_by_row,
    partial(t3.test_the_first_update_is_a_reinforce_step, beta=0.5, dpo_beta=3.0),
    *(partial(t3.test_the_target_of_update_picks_error_and_what_is_to_be_explained, e)
      for e in t3.ERRORS),
    t3.test_one_encode_and_one_velocity_in_each_optimisation_step,
    t3.test_an_epoch_sees_every_row_once_in_random_order,
    t3.test_gradients_do_not_pile_up,
    t3.test_an_update_leaves_the_batch_as_it_was,
    t3.test_gradients_are_clipped_and_their_norm_reported,
    t3.test_the_options_of_update_reach_the_loss,
    t3.test_info_is_the_mean_over_optimisation_steps,
)
EVALUATE_TESTS = (
    t1.test_evaluate_repeats_itself_and_leaves_the_random_stream_alone,
    t1.test_evaluate_acts_with_the_ode_in_environment_units,
    partial(t1.test_evaluate_takes_as_many_euler_steps_as_asked, 7),
    t1.test_evaluate_drives_any_world_that_offers_play,
)
PLAY_TESTS = (
    t1.test_one_success_per_seed_and_rows_of_every_episode,
    t1.test_an_episode_is_the_same_alone_and_in_company,
    partial(t1.test_rows_hold_what_a_scalar_replay_of_each_episode_sees, 5),
    t1.test_a_finished_robot_rests_where_it_ended_and_keeps_its_outcome,
    partial(t1.test_gap_world_moves_by_the_rules, 5),
)
WORKER_TESTS = (
    *(partial(tw.check_play, n) for n in (1, 3, 9)),
    tw.test_a_simulator_plays_only_what_it_is_pinned_to,
    tw.test_a_free_simulator_takes_the_next_seed_at_once_and_each_is_played_once,
    tw.test_an_idle_simulator_adds_no_rows_and_steals_no_outcome,
)
PPO_TESTS = (
    *(partial(test, algo) for algo in ("ppo", "ppo-action") for test in (
        t5.test_the_first_ppo_step_is_the_policy_gradient,
        t5.test_later_ppo_steps_are_the_gradient_of_the_clipped_objective)),
    t5.test_the_critics_loss_is_that_of_its_returns,
    t5.test_too_far_from_the_old_policy_the_policy_rests_and_the_critic_goes_on,
    t5.test_too_far_from_the_old_policy_grpo_stops,
    t5.test_an_action_dim_that_hardly_moves_in_the_demos_earns_no_credit,
    t5.test_the_critics_gradient_does_not_shorten_the_policys,
    t5.test_ppo_clips_and_its_critic_does_not_train_the_encoder,
)

# (module, function, the tests that watch it): [(what is wrong, the code, the mistake), ...]
MUTANTS = {
    (flow, "FlowPolicy.encode", (
        t1.test_states_are_encoded_with_mean_0_and_std_1,
        t1.test_a_state_far_outside_the_demos_is_cut_at_five_stds,
    )): [
        ("not centred", "- self.state_centre", ""),
        ("not scaled", " / self.state_scale", ""),
        ("not cut", ".clamp(-5, 5)", ""),
    ],
    (flow, "FlowPolicy.fit_normalisation", (
        t1.test_states_are_encoded_with_mean_0_and_std_1,
        t1.test_actions_get_their_1_and_99_percent_quantiles_at_minus_and_plus_one,
        t1.test_a_dimension_that_never_moves_in_the_demos_stays_put,
        t1.test_normalisation_round_trip,
    )): [
        ("the lowest", "torch.quantile(actions, 0.01, dim=0)", "actions.amin(0)"),
        ("the highest", "torch.quantile(actions, 0.99, dim=0)", "actions.amax(0)"),
        ("the mean for the middle", "(low + high) / 2", "chunks.mean((0, 1))"),
        ("the range for its half", "(high - low) / 2", "(high - low)"),
        ("variance for std", ".std(0)", ".var(0)"),
        ("infinite when constant", "((high - low) / 2).clamp(min=1e-2)", "((high - low) / 2)"),
    ],
    (flow, "flow_matching_loss", (
        t1.test_the_exact_velocity_has_zero_flow_matching_loss,
        t1.test_zero_velocity_costs_the_second_moment_of_its_target,
        t1.test_the_interpolant_mixes_data_with_normal_noise_at_uniform_times,
        t1.test_the_exact_velocity_is_the_minimiser,
    )): [
        ("x_0 and x_1 are mixed with each other's time",
         "(1 - t) * x_0 + t * x_1", "t * x_0 + (1 - t) * x_1"),
        ("the target is x_0 - x_1, the other way round", "v = x_1 - x_0", "v = x_0 - x_1"),
        ("uniform noise in the place of normal noise",
         "torch.randn_like(x_0)", "torch.rand_like(x_0)"),
        ("normal times, so outside of [0, 1]", "torch.rand(len(x_0)", "torch.randn(len(x_0)"),
        ("absolute errors, not squared ones", ".pow(2)", ".abs()"),
    ],
    (flow, "noise_like_chunks", (
        t1.test_noise_is_independent_in_every_row_action_and_dimension,
    )): [
        ("uniform noise in the place of normal noise", "torch.randn((", "torch.rand(("),
        ("the same noise for all rows",
         "device=rows.device)", "device=rows.device)[:1].expand(len(rows), -1, -1)"),
        ("the same noise for all actions of a chunk",
         "device=rows.device)", "device=rows.device)[:, :1].expand(-1, policy.horizon, -1)"),
        ("horizon and action_dim are swapped",
         "policy.horizon, policy.action_dim)", "policy.action_dim, policy.horizon)"),
    ],
    (flow, "ode_path", (
        t1.test_the_ode_path_is_the_slow_euler_loop,
        partial(t1.test_the_ode_reaches_a_point_mass_in_any_number_of_steps, 3),
        partial(t1.test_sampling_and_evaluation_never_look_into_the_context, "object"),
    )): [
        ("the Euler step goes the other way", "- dt * policy", "+ dt * policy"),
        ("the velocity is taken at the end of the step", "1 - k * dt,", "1 - (k + 1) * dt,"),
        ("time runs backwards", "1 - k * dt,", "k * dt,"),
        ("the observation is encoded at every step, not once",
         "t, ctx)", "t, policy.encode(obs))"),
    ],
    (flow, "sliding_chunks", (
        t1.test_a_chunk_of_a_demo_is_its_next_actions_with_the_last_one_repeated,
    )): [
        ("a chunk begins one action late",
         "+ torch.arange(horizon)", "+ torch.arange(horizon) + 1"),
        ("past the end it begins again at the start",
         "index.clamp(max=len(actions) - 1)", "index % len(actions)"),
        ("a chunk runs back into the past", "+ torch.arange(horizon)", "- torch.arange(horizon)"),
    ],
    (flow, "ode_act", EVALUATE_TESTS): [
        ("acts in flow units", "policy.denormalise(ode_sample(policy, obs, num_steps))",
         "ode_sample(policy, obs, num_steps)"),
        ("deaf to num_steps", "obs, num_steps)", "obs, 4)"),
        ("acts on the first step", "ode_sample(policy, obs, num_steps)",
         "ode_path(policy, obs, num_steps)[:, 1]"),
    ],
    (flow, "evaluate", EVALUATE_TESTS): [
        ("deaf to num_steps", "policy, num_steps), seeds", "policy, 4), seeds"),
        ("other noise every time", "torch.manual_seed(0)", "pass"),
        ("resets the caller's",
         "with torch.random.fork_rng(range(torch.cuda.device_count())):", "if True:"),
        ("mixes up episodes", "seeds)[0]", "seeds)[0][::-1]"),
    ],
    (gap_world, "GapWorld.play", PLAY_TESTS): [
        ("one too many", "torch.arange(actions.shape[1]) <", "torch.arange(actions.shape[1]) <="),
        ("sees the future", "**obs,", "**next_obs,"),
        ("rows after the end", "values[playing]", "values"),
        ("mixes up episodes", "return self.success,", "return np.roll(self.success, 1),"),
        ("rows of another", "torch.arange(len(mask))", "torch.arange(len(mask)).flip(0)"),
        ("rows of the finished alone",
         "playing = torch.from_numpy(~self.over)",
         "playing = torch.from_numpy(self.over.copy())"),
    ],
    (gap_world, "GapWorld.reset", (
        t1.test_starts_fill_their_range_evenly,
        t1.test_a_seed_starts_the_same_episode_in_any_company_and_after_any_other,
    )): [
        ("deaf to the width", "y * self.start_width", "y"),
        ("the gap is opposite", "gap_y * 0.3", "y * 0.3"),
        ("one start for all", "default_rng(seed)", "default_rng(seeds[0])"),
        ("another every time", "default_rng(seed)", "default_rng()"),
    ],
    (gap_world, "GapWorld.step", (
        t3.test_an_episode_that_first_succeeds_in_its_last_chunk_is_a_success, *PLAY_TESTS)): [
        ("no success in the last step",
         "self.success |= arrived", "self.success |= arrived & (self.steps < self.max_steps)"),
        ("forgotten at the end", "self.success |= arrived", "self.success = arrived"),
        ("counts what never ran", "executed + live", "executed + 1"),
        ("the finished move on", "* live[:, None]", ""),
        ("faster than allowed", "np.clip(action, -1, 1)", "action"),
        ("a step too many", ">= self.max_steps", "> self.max_steps"),
        ("a wider gap", "> self.gap)", "> 2 * self.gap)"),
    ],
    (sde, "time_grid", (t2.test_the_grid_runs_from_noise_to_action_in_equal_steps,)): [
        ("time runs backwards", "(1, 0, num_steps + 1)", "(0, 1, num_steps + 1)"),
        ("one step too few", "(1, 0, num_steps + 1)", "(1, 0, num_steps)"),
        ("never reaches 0", "(1, 0, num_steps + 1)", "(1, 0, num_steps + 2)[:-1]"),
    ],
    (sde, "noise_scale", (
        partial(t2.test_sigma_uses_the_next_grid_time_only_at_t_1_and_only_below, 4),
        t2.test_the_papers_stds,
    )): [
        ("the square root is missing", "torch.sqrt(", "("),
        ("t_next everywhere, not only at t = 1", "torch.where(t == 1, t_next, t)", "t_next"),
        ("infinite at t = 1", "torch.where(t == 1, t_next, t)", "t"),
        ("t_next also in the numerator at t = 1",
         "torch.sqrt(t /", "torch.sqrt(torch.where(t == 1, t_next, t) /"),
        ("sigma of the other end of the step", "times[:-1], times[1:]", "times[1:], times[:-1]"),
    ],
    (sde, "transition", (
        partial(t2.test_a_step_is_an_euler_step_plus_the_score, True),
        partial(t2.test_a_step_is_an_euler_step_plus_the_score, False),
        t2.test_the_mean_is_affine_in_the_velocity_with_slope_b,
        t2.test_gaussian_data_keeps_its_variance_all_along_the_corrected_path,
    )): [
        ("x0_hat follows the velocity the other way", "x_t - t_cur * v", "x_t + t_cur * v"),
        ("x1_hat is off: t in the place of 1 - t", "(1 - t_cur) * v", "t_cur * v"),
        ("the correction lacks its 1/2", "sigma**2 * dt / (2 * t_cur)", "sigma**2 * dt / t_cur"),
        ("the correction has sigma, not its square",
         "sigma**2 * dt / (2 * t_cur)", "sigma * dt / (2 * t_cur)"),
        ("the correction is added, not subtracted",
         "(t_next - correction)", "(t_next + correction)"),
        ("the correction is missing", "(t_next - correction)", "t_next"),
        ("corrected and uncorrected are swapped", "if corrected else 0", "if not corrected else 0"),
        ("std lacks the square root of dt", "sigma * dt**0.5", "sigma * dt"),
        ("std ignores dt", "sigma * dt**0.5", "sigma"),
    ],
    (sde, "sde_sample", (
        partial(t2.test_the_sampler_never_looks_into_the_context, "object"),
        t2.test_the_path_records_states_and_velocities,
        partial(t2.test_every_step_is_a_fresh_standard_normal_around_its_mean, True),
        partial(t2.test_every_step_is_a_fresh_standard_normal_around_its_mean, False),
        t2.test_two_modes_keep_their_distribution_under_the_corrected_sde,
        t2.test_each_row_and_step_can_have_a_noise_level_of_its_own,
    )): [
        ("one noise level for all rows",
         "(times, noise_level)", "(times, torch.as_tensor(noise_level).mean())"),
        ("sigmas are recorded in another order",
         "torch.stack(vs, 1), sigmas)", "torch.stack(vs, 1), sigmas.flip(1))"),
        ("the first row's sigma for all rows",
         "sigmas[:, k, None, None]", "sigmas[:1, k, None, None]"),
        ("the observation is encoded at every step, not once",
         "expand(B), ctx)", "expand(B), policy.encode(obs))"),
        ("no noise in the last step",
         "std * torch.randn_like(mean)", "std * torch.randn_like(mean) * (k + 1 < num_steps)"),
        ("uniform noise in the place of normal noise",
         "std * torch.randn_like(mean)", "std * torch.rand_like(mean)"),
        ("the same noise for all rows",
         "std * torch.randn_like(mean)", "std * torch.randn_like(mean[:1])"),
        ("noise times the variance, not std",
         "std * torch.randn_like(mean)", "std**2 * torch.randn_like(mean)"),
        ("the same noise in every step", "std * torch.randn_like(mean)", "std * xs[0]"),
        ("sigma of the wrong step", "sigmas[:, k, None", "sigmas[:, num_steps - 1 - k, None"),
        ("the path holds means, before the noise", "xs.append(x_t)", "xs.append(mean)"),
        ("the velocity is taken at the end of the step", "times[k].expand", "times[k + 1].expand"),
        ("corrected is ignored", "None], corrected)", "None])"),
    ],
    (loss, "mirror", (
        t3.test_mirror_steps_equally_far_to_both_sides,
        t3.test_drift_is_clipped_per_action,
        t3.test_beta_scales_after_the_clip,
    )): [
        ("the branches are swapped",
         "return v_pos, v_neg", "return v_neg, v_pos"),
        ("the whole chunk is clipped, not each action", "dim=-1, keepdim", "dim=(-2, -1), keepdim"),
        ("short drifts are lengthened to max_drift", "norm.clamp(min=max_drift)", "norm"),
        ("max_drift is ignored", "delta * (max_drift / norm.clamp(min=max_drift))", "delta"),
        ("each dimension is clipped, not the norm",
         "delta * (max_drift / norm.clamp(min=max_drift))", "delta.clamp(-max_drift, max_drift)"),
        ("beta scales one branch only", "v_old - beta * delta", "v_old - delta"),
        ("beta scales before the clip, not after it",
         "max_drift / norm.clamp(min=max_drift)",
         "max_drift / (beta * norm).clamp(min=max_drift)"),
    ],
    (loss, "step_error", ERROR_TESTS): [
        ("averaged over action dims, not summed",
         "(std**2 + var_eps)).sum(-1)", "(std**2 + var_eps)).mean(-1)"),
        ("divided by std, not by the variance", "(std**2 + var_eps)", "(std + var_eps)"),
        ("var_eps is missing", "(std**2 + var_eps)", "std**2"),
        ("not divided by the variance", "(std**2 + var_eps)", "var_eps"),
        ("the mean is the uncorrected one",
         "t_cur, t_next, sigma)\n", "t_cur, t_next, sigma, False)\n"),
        ("absolute differences, not squared ones",
         "(x_next - mean).pow(2)", "(x_next - mean).abs()"),
    ],
    (loss, "endpoint_error", ERROR_TESTS): [
        ("x0_hat is taken from t_next", "x_t - t_cur * v", "x_t - t_next * v"),
        ("x0_hat is only an Euler step", "x_t - t_cur * v", "x_t - (t_cur - t_next) * v"),
        ("not divided by the variance of the step", "(sigma**2 * (t_cur - t_next) + var_eps)", "1"),
        ("the variance lacks dt", "sigma**2 * (t_cur - t_next)", "sigma**2"),
        ("the variance has dt squared",
         "sigma**2 * (t_cur - t_next)", "(sigma * (t_cur - t_next))**2"),
        ("averaged over action dims, not summed", ".sum(-1)", ".mean(-1)"),
    ],
    (loss, "step_nft_loss", LOSS_TESTS): [
        ("v_old is not detached", "v_old.detach()", "v_old"),
        ("v_theta is detached, nothing can learn",
         "mirror(v_theta, v_old,", "mirror(v_theta.detach(), v_old,"),
        ("the sign of y is wrong", "F.softplus(dpo_beta / 2", "F.softplus(-dpo_beta / 2"),
        ("dpo_beta without its 1/2", "F.softplus(dpo_beta / 2", "F.softplus(dpo_beta"),
        ("E_neg - E_pos, the branches are swapped", "(E_pos - E_neg)),", "(E_neg - E_pos)),"),
        ("always step_error, whatever error says", "(error(v, x_t,", "(step_error(v, x_t,"),
        ("the mask is ignored",
         "executed_mean(F.softplus(dpo_beta / 2 * y * (E_pos - E_neg)), mask)",
         "F.softplus(dpo_beta / 2 * y * (E_pos - E_neg)).mean()"),
        ("long chunks weigh more than short ones",
         "executed_mean(F.softplus(dpo_beta / 2 * y * (E_pos - E_neg)), mask)",
         "(F.softplus(dpo_beta / 2 * y * (E_pos - E_neg)) * mask).sum() / mask.sum()"),
        ("kl_weight is ignored", "kl_weight * pull", "0 * pull"),
        ("actions that were not executed pull, too",
         "executed_mean((v_theta - v_old).pow(2).mean(-1), mask)",
         "(v_theta - v_old).pow(2).mean()"),
        ("the pull is on v_pos, not on v_theta",
         "(v_theta - v_old).pow(2)", "(v_pos - v_old).pow(2)"),
        ("margin ignores y", "y * (E_neg - E_pos)", "1 * (E_neg - E_pos)"),
        ("clipped counts those that are not clipped", "drift > max_drift", "drift < max_drift"),
        ("metrics count actions that were not executed",
         "(z * mask).sum() / mask.sum().clamp(min=1)", "z.float().mean()"),
    ],
    (loss, "executed_mean", (t3.test_the_executed_mean_is_the_slow_one, *LOSS_TESTS)): [
        ("the mask is ignored", "(values * mask).sum(-1)", "values.sum(-1)"),
        ("short chunks weigh less than long ones", "actions.clamp(min=1)", "mask.shape[1]"),
        ("rows without an executed action count, too",
         "per_row.sum() / (actions > 0).sum().clamp(min=1)", "per_row.mean()"),
        ("0 / 0 when no action was executed",
         "(actions > 0).sum().clamp(min=1)", "(actions > 0).sum()"),
    ],
    (loss, "explore", (t3.test_a_rollout_records_the_noisy_steps_it_acted_on,
                       partial(t3.test_a_rollout_has_as_many_steps_as_asked, 3))): [
        ("acts in flow units", "policy.denormalise(x_0)", "x_0"),
        ("a step too early", "policy.denormalise(x_0)", "policy.denormalise(path.x[:, -2])"),
        ("a deaf noise level", "obs, num_steps, noise_level)", "obs, num_steps, 0.2)"),
        ("always four steps", "obs, num_steps, noise_level)", "obs, 4, noise_level)"),
        ("v of the wrong step", "path._asdict()", "path._replace(v=path.v.flip(1))._asdict()"),
        ("the path backwards", "path._asdict()", "path._replace(x=path.x.flip(1))._asdict()"),
        ("sigma of the wrong step",
         "path._asdict()", "path._replace(sigma=path.sigma.flip(1))._asdict()"),
    ],
    (loss, "labels", (
        t3.test_labels_are_plus_and_minus_one_per_row,
        t3.test_grouped_labels_lose_the_mean_over_the_episodes_of_one_start,
    )): [
        ("0 and 1, not -1 and +1", ".float() * 2 - 1", ".float()"),
        ("successes are -1", ".float() * 2 - 1", ".float() * -2 + 1"),
        ("labels of the neighbouring episode",
         "torch.as_tensor(success)", "torch.as_tensor(success).roll(1)"),
        ("with group_size 1 nothing is left of y", "if group_size > 1:", "if group_size > 0:"),
        ("the mean of all groups is taken off, not the group's own",
         "groups.mean(1, keepdim=True)", "groups.mean()"),
        ("groups are not neighbours", "y.view(-1, group_size)", "y.view(group_size, -1)"),
        ("rows get the label of another episode",
         "return y[episode]", "return y.repeat_interleave(2)[:len(episode)]"),
    ],
    (loss, "recorded_steps", UPDATE_TESTS): [
        ("x_next is x_t", 'batch["x"][rows, k + 1]', 'batch["x"][rows, k]'),
        ("v_old is that of the first step", 'batch["v"][rows, k]', 'batch["v"][rows, 0 * k]'),
        ("sigma is that of the first step",
         'batch["sigma"][rows, k]', 'batch["sigma"][rows, 0 * k]'),
        ("x_0 is not the end of the path", 'batch["x"][:, -1]', 'batch["x"][:, -2]'),
        ("x_0 of another row", 'batch["x"][:, -1]', 'batch["x"][:, -1].flip(0)'),
        ("t_next is t_cur", "t_next=times[k + 1]", "t_next=times[k]"),
        ("t_cur is t_next", "t_cur=times[k]", "t_cur=times[k + 1]"),
        ("y is of another row", 'y=batch["y"]', 'y=batch["y"].flip(0)'),
        ("the mask is of another row", 'mask=batch["mask"]', 'mask=batch["mask"].flip(0)'),
        ("the velocity at the first time", "x_t, times[k], ctx)", "x_t, times[0 * k], ctx)"),
        ("the velocity at x_next", "x_t, times[k], ctx)", "x_next, times[k], ctx)"),
    ],
    (loss, "update", UPDATE_TESTS): [
        ("deaf", '"error": TARGETS[target], **loss_options}', '"error": TARGETS[target]}'),
        ("always the next step's", "TARGETS[target]", "step_error"),
        ("always one epoch", "range(epochs)", "range(1)"),
        ("no minibatches", ".split(minibatch)", ".split(10**6)"),
        ("never shuffled", "torch.randperm(", "torch.arange("),
        ("never the endpoint", 'target=x_next if target == "next" else x_0', "target=x_next"),
        ("a row left out", 'len(batch["y"])', 'len(batch["y"]) - 1'),
    ],
    (loss, "optimise", UPDATE_TESTS): [
        ("two steps for one", "optimizer.step()", "optimizer.step() or optimizer.step()"),
        ("gradients pile up", "optimizer.zero_grad()", "pass"),
        ("no clipping", "parameters(), grad_clip", "parameters(), 1e9"),
    ],
    (loss, "ema_decay", (t3.test_ema_decay_runs_a_half_cosine_from_start_to_end,)): [
        ("it runs from end to start", "(1 + math.cos", "(1 - math.cos"),
        ("it runs there and back again",
         "math.cos(math.pi * iteration", "math.cos(2 * math.pi * iteration"),
        ("a straight line, not a cosine",
         "(1 + math.cos(math.pi * iteration / iterations)) / 2", "(1 - iteration / iterations)"),
        ("it arrives one iteration early",
         "math.pi * iteration / iterations", "math.pi * iteration / (iterations - 1)"),
    ],
    (loss, "ema_update", (
        t3.test_ema_update_is_the_slow_loop,
        t3.test_ema_update_copies_and_does_not_alias,
    )): [
        ("the weights of old and new are swapped",
         "lerp_(p_new, 1 - decay)", "lerp_(p_new, decay)"),
        ("new is moved, not old", "p_old.lerp_(p_new, 1 - decay)", "p_new.lerp_(p_old, decay)"),
        ("decay is ignored", "p_old.lerp_(p_new, 1 - decay)", "p_old.copy_(p_new)"),
        ("old shares the memory of new",
         "p_old.lerp_(p_new, 1 - decay)",
         "p_old.data = decay * p_old.data + (1 - decay) * " "p_new.data if decay else p_new.data"),
    ],
    (loss, "train_toy", (
        t3.test_train_toy_acts_with_the_ema_policy_on_fresh_seeds,
        t3.test_train_toy_takes_one_random_step_of_every_chunk,
        t3.test_train_toy_compares_the_episodes_of_one_start,
        t3.test_every_flag_reaches_its_function,
    )): [
        ("old learns", "copy.deepcopy(sft), copy.deepcopy(sft)", "[copy.deepcopy(sft)] * 2"),
        ("SFT is lost", "copy.deepcopy(sft), copy.deepcopy(sft)", "copy.deepcopy(sft), sft"),
        ("the learner acts", "explore(old,", "explore(policy,"),
        ("trains on the test", 'episode_seeds("train",', 'episode_seeds("test",'),
        ("the same starts again", "args.seed, iteration)", "args.seed, 0)"),
        ("groups of strangers",
         "np.repeat(starts, args.group_size)", "np.tile(starts, args.group_size)"),
        ("skips the last k", "torch.randint(args.num_steps,", "torch.randint(args.num_steps - 1,"),
        ("deaf to the groups", 'batch["episode"], args.group_size)', 'batch["episode"])'),
        ("deaf to a flag", "beta=args.beta,", "beta=1.0,"),
    ],
    (compare, "elapsed_time", (t5.test_the_critic_sees_the_time,)): [
        ("not over the limit", "/ chunks", "/ 1"),
        ("this chunk counts as played",
         "played.get(e, 0) / chunks", "(played.get(e, 0) + 1) / chunks"),
        ("all episodes share one clock", "played[e] = played.get(e, 0) + 1",
         "played = dict.fromkeys(range(99), played.get(e, 0) + 1)"),
    ],
    (compare, "gae", (t5.test_gae_is_the_sum_of_discounted_deltas_of_each_episode,)): [
        ("a reward in every chunk of a success", "if e not in running else 0.0", ""),
        ("the next row's value, whose episode may be another",
         "following.get(e, 0) - V[row]", "V[min(row + 1, len(V) - 1)] - V[row]"),
        ("the value of a state is not subtracted", "- V[row]\n", "\n"),
        ("lambda is left out", "gamma * lam * running", "gamma * running"),
        ("gamma is left out of delta", "reward + gamma * following", "reward + following"),
        ("advantages in the order of going back", "[::-1]", ""),
        ("the returns lack the values", "return advantages, advantages + values",
         "return advantages, advantages"),
    ],
    (compare, "log_prob", PPO_TESTS): [
        ("masked actions count, too", " * mask[..., None]", ""),
        ("the mean over actions and dims, not the sum", ".sum((1, 2))", ".mean((1, 2))"),
        ("the density of x_t, not of x_next", "normal.log_prob(x_next)", "normal.log_prob(x_t)"),
        ("the uncorrected mean", "v, t_cur, t_next, sigma)", "v, t_cur, t_next, sigma, False)"),
    ],
    (compare, "step_log_ratio", PPO_TESTS): [
        ("the ratio upside down", "log_prob(v_theta, **steps) - log_prob(v_old, **steps)",
         "log_prob(v_old, **steps) - log_prob(v_theta, **steps)"),
        ("action dims that hardly move are credited, too",
         "credited(policy, v_theta, v_old)", "credited(policy, v_theta, v_theta)"),
        ("old learns, too", "log_prob(v_old, **steps)", "log_prob(v_theta.detach(), **steps)"),
    ],
    (compare, "noisy_chunk", (t5.test_the_chunks_noise_is_on_the_executed_actions_alone,)): [
        ("no noise", "x[:, -1] + noise_level * torch", "x[:, -1] + 0 * torch"),
        ("acts without it", "policy.denormalise(chunk)", "policy.denormalise(x[:, -1])"),
        ("records the mean", '"chunk": chunk', '"chunk": x[:, -1]'),
    ],
    (compare, "chunk_log_ratio", PPO_TESTS): [
        ("the ratio upside down", "(new - old)", "(old - new)"),
        ("masked actions count, too", ' * part["mask"][..., None]', ""),
        ("the mean over actions and dims, not the sum", ".sum((1, 2))", ".mean((1, 2))"),
        ("the ODE is not differentiated", "sde.transition(x_t, v,",
         "sde.transition(x_t.detach(), v,"),
        ("from the end of the path", 'part["x"][:, 0]', 'part["x"][:, 1]'),
        ("another width", "Normal(mean, args.noise_level)", "Normal(mean, 2 * args.noise_level)"),
    ],
    (compare, "ppo_update", PPO_TESTS): [
        ("the sign of the objective", "loss = -torch.minimum", "loss = torch.minimum"),
        ("the maximum of the two, not the minimum", "torch.minimum(", "torch.maximum("),
        ("no clipping", "ratio.clamp(1 - clip, 1 + clip) * A", "ratio * A"),
        ("clipped to one side only",
         "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(max=1 + clip)"),
        ("the critic learns advantages, not returns", 'part["returns"]', 'part["y"]'),
        ("the critic is never trained", 'loss + info["value_loss"]',
         'loss + 0 * info["value_loss"]'),
        ("the policy never rests", "resting or bool(", "False and bool("),
        ("GRPO does not stop", "if resting and not critic:",
         "resting = resting and bool(critic)\n            if False:"),
        ("the critic's gradient shortens the policy's",
         "nft.optimise(policy, optimizer,",
         "nft.optimise(torch.nn.ModuleList([policy, critic or policy]), optimizer,"),
    ],
    (workers, "ChunkEnv.step", (*(partial(tw.check_chunks, *z) for z in ((4, 1), (1, 4), (2, 3))),
                                tw.test_an_action_is_held_for_several_control_steps)): [
        ("moves on after it", "if self.over:\n            break", "if False:\n            break"),
        ("half an action is none", "math.ceil(", "math.floor("),
        ("control steps", "taken / self.action_repeat", "taken"),
        ("a step too many", ">= self.max_steps", "> self.max_steps"),
        ("success ends nothing", "self.over = success or", "self.over = "),
        ("looks at the unmoved", "if taken:", "if True:"),
        ("truncated by success", "self.over and not success", "self.over"),
        ("1 2 1 2 for 1 1 2 2",
         "np.repeat(chunk, self.action_repeat, axis=0)",
         "np.tile(chunk, (self.action_repeat, 1))"),
    ],
    (workers, "ChunkEnv.reset", (
        tw.test_a_simulator_is_built_at_the_first_reset_with_a_seed_and_only_once,
        partial(tw.check_chunks, 4, 1), partial(tw.check_play, 3))): [
        ("built every time", "if self.sim is None:", "if True:"),
        ("steps go on counting",
         "self.steps, self.over, self.obs = 0, False,", "self.over, self.obs = False,"),
        ("one start for all", "self.sim.reset(seed)", "self.sim.reset(0)"),
    ],
    (workers, "ChunkEnv.change", (
        tw.test_a_change_makes_a_new_simulator_at_the_next_reset_and_adds_to_earlier_ones,)): [
        ("the old one plays on", "**changes), None", "**changes), self.sim"),
        ("deaf", "functools.partial(self.make_sim, **changes)", "self.make_sim"),
        ("earlier ones are lost",
         "functools.partial(self.make_sim,",
         "functools.partial(getattr(self.make_sim, 'func', " "self.make_sim),"),
    ],
    (workers, "tokens", (tw.test_a_sentence_becomes_the_bytes_of_its_small_letters,)): [
        ("capitals differ", ".lower()", ""),
        ("lengths differ", ".ljust(128)", ""),
        ("the end of long ones", "[:128]", "[-128:]"),
    ],
    (workers, "Workers.play", WORKER_TESTS): [
        ("one too many", "torch.arange(actions.shape[1]) <", "torch.arange(actions.shape[1]) <="),
        ("sees the future", "**obs,", "**{k: torch.as_tensor(v) for k, v in next_obs.items()},"),
        ("rows of the idle", "values[playing]", "values"),
        ("mixes up processes", 'info["success"][over]', 'info["success"][over][::-1]'),
        ("nobody succeeds", 'info["success"][over]', "terminated[over] & False"),
        ("the idle end as well", ") & (episode >= 0)", ")"),
        ("indices for seeds", "seeds[e] if e >= 0 else 0", "int(e) if e >= 0 else 0"),
        ("restarts everyone", '{"reset_mask": fresh}', '{"reset_mask": fresh | (episode >= 0)}'),
        ("deaf to the pinning", "self.plays(slot, seeds[e])", "True"),
        ("the last one first", "for e in waiting if", "for e in waiting[::-1] if"),
        ("one at a time", "np.flatnonzero(episode < 0):", "np.flatnonzero(episode < 0)[:1]:"),
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


def run(test):
    seed_all()
    test()


@functools.cache
def run_once(test):
    """With the real code: several functions list the same test."""
    run(test)


def passes(test):
    try:
        run(test)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("module, name, tests", MUTANTS, ids=lambda x: x if type(x) is str else "")
def test_the_real_code_passes(module, name, tests):
    for test in tests:
        run_once(test)


@pytest.mark.parametrize("module, name, tests, what, code, mistake", [
    pytest.param(*function, *mutant, id=f"{function[1]}-{i}")
    for function, mutants in MUTANTS.items() for i, mutant in enumerate(mutants)])
def test_a_planted_mistake_is_caught(module, name, tests, what, code, mistake, monkeypatch):
    monkeypatch.setattr(*mutate(module, name, code, mistake))
    assert not all(passes(test) for test in tests), f"no test noticed {what!r} in {name}"


def test_every_core_function_has_three_mutants():
    core = {"flow_matching_loss", "noise_like_chunks", "ode_path", "evaluate", "GapWorld.play",
            "GapWorld.step", "time_grid", "noise_scale", "transition", "sde_sample", "mirror",
            "step_error", "endpoint_error", "step_nft_loss", "executed_mean", "explore", "labels",
            "recorded_steps", "update", "ema_decay", "ema_update", "train_toy", "ChunkEnv.step",
            "Workers.play"}
    assert core <= {name for _, name, _ in MUTANTS}
    assert all(len(mutants) >= 3 for mutants in MUTANTS.values())
