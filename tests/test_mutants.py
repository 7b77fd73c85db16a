"""Do the tests test? Each mistake below is planted in the real code, and a test must notice.

A mutant is one function of 01-03 or of envs/workers.py with one snippet exchanged, compiled from
its source at run time. Each must fail at least one of the tests listed with its function;
unmutated, all of them pass.
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
import test_envs_workers as tw

flow, sde, loss, workers = t1.flow, t2.sde, t3.loss, tw.workers
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
    *(partial(t3.test_the_first_update_is_a_reinforce_step, columns=n, beta=0.5, dpo_beta=3.0)
      for n in (1, 4)),
    *(partial(t3.test_several_steps_a_row_are_the_rows_expanded_by_hand, columns=4, target=e)
      for e in t3.ERRORS),
    *(partial(t3.test_the_target_of_update_picks_error_and_what_is_to_be_explained, e)
      for e in t3.ERRORS),
    partial(t3.test_one_encode_and_a_velocity_per_column_in_each_optimisation_step, 4),
    t3.test_an_epoch_sees_every_row_once_in_random_order,
    t3.test_gradients_do_not_pile_up,
    t3.test_an_update_leaves_the_batch_as_it_was,
    t3.test_gradients_are_clipped_and_their_norm_reported,
    t3.test_the_options_of_update_reach_the_loss,
    t3.test_info_is_the_mean_over_optimisation_steps,
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

# (module, function, the tests that watch it): [(the code, the mistake), ...]
MUTANTS = {
    (flow, "FlowPolicy.encode", (
        t1.test_states_are_encoded_with_mean_0_and_std_1,
        t1.test_a_state_far_outside_the_demos_is_cut_at_five_stds,
    )): [
        ("- self.state_centre", ""),                                       # not centred
        (" / self.state_scale", ""),                                       # not scaled
        (".clamp(-5, 5)", ""),                                             # not cut
    ],
    (flow, "FlowPolicy.fit_normalisation", (
        t1.test_states_are_encoded_with_mean_0_and_std_1,
        t1.test_actions_get_their_1_and_99_percent_quantiles_at_minus_and_plus_one,
        t1.test_a_dimension_that_never_moves_in_the_demos_stays_put,
        t1.test_normalisation_round_trip,
    )): [
        ("(0.01, 0.99)", "(0.0, 1.0)"),                                    # the extremes
        ("(low + high) / 2", "chunks.mean((0, 1))"),                       # the mean for the middle
        ("(high - low) / 2", "(high - low)"),                              # the range for its half
        (".std(0)", ".var(0)"),                                            # variance for std
        ("((high - low) / 2).clamp(min=1e-2)", "((high - low) / 2)"),      # infinite when constant
    ],
    (flow, "flow_matching_loss", (
        t1.test_the_exact_velocity_has_zero_flow_matching_loss,
        t1.test_zero_velocity_costs_the_second_moment_of_its_target,
        t1.test_the_interpolant_mixes_data_with_normal_noise_at_uniform_times,
        t1.test_the_exact_velocity_is_the_minimiser,
    )): [
        ("(1 - t)[:, None, None] * x_0 + t[:, None, None] * x_1",
         "t[:, None, None] * x_0 + (1 - t)[:, None, None] * x_1"),         # the other time
        ("(x_1 - x_0)", "(x_0 - x_1)"),                                    # velocity reversed
        ("torch.randn_like(x_0)", "torch.rand_like(x_0)"),                 # the wrong noise
        ("torch.rand(len(x_0)", "torch.randn(len(x_0)"),                   # times outside [0, 1]
        (".pow(2)", ".abs()"),                                             # medians for means
    ],
    (flow, "noise_like_chunks", (
        t1.test_noise_is_independent_in_every_row_action_and_dimension,
    )): [
        ("torch.randn((", "torch.rand(("),                                 # the wrong noise
        ("device=rows.device)", "device=rows.device)[:1].expand(len(rows), -1, -1)"),  # one for all
        ("device=rows.device)", "device=rows.device)[:, :1].expand(-1, policy.horizon, -1)"),
        ("policy.horizon, policy.action_dim)", "policy.action_dim, policy.horizon)"),  # transposed
    ],
    (flow, "ode_path", (
        t1.test_the_ode_path_is_the_slow_euler_loop,
        partial(t1.test_the_ode_reaches_a_point_mass_in_any_number_of_steps, 3),
        partial(t1.test_sampling_and_evaluation_never_look_into_the_context, "object"),
    )): [
        ("- dt * policy", "+ dt * policy"),                                # the other way
        ("1 - k * dt)", "1 - (k + 1) * dt)"),                              # velocity at the wrong t
        ("1 - k * dt)", "k * dt)"),                                        # time runs backwards
        ("t, ctx))", "t, policy.encode(obs)))"),                           # encodes at every step
    ],
    (flow, "sliding_chunks", (
        t1.test_a_chunk_of_a_demo_is_its_next_actions_with_the_last_one_repeated,
    )): [
        ("+ torch.arange(horizon)", "+ torch.arange(horizon) + 1"),        # off by one
        ("index.clamp(max=len(actions) - 1)", "index % len(actions)"),     # wraps around
        ("+ torch.arange(horizon)", "- torch.arange(horizon)"),            # the past
    ],
    (flow, "evaluate", (
        t1.test_evaluate_repeats_itself_and_leaves_the_random_stream_alone,
        t1.test_evaluate_acts_with_the_ode_in_environment_units,
        partial(t1.test_evaluate_takes_as_many_euler_steps_as_asked, 7),
        t1.test_evaluate_drives_any_world_that_offers_play,
    )): [
        ("policy.denormalise(x_0)", "x_0"),                                # acts in flow units
        ("policy), num_steps)", "policy), 4)"),                            # deaf to num_steps
        ("torch.manual_seed(0)", "pass"),                                  # other noise every time
        ("with torch.random.fork_rng(range(torch.cuda.device_count())):",
         "if True:"),                                                     # resets the caller's
        ("seeds)[0]", "seeds)[0][::-1]"),                                  # mixes up episodes
    ],
    (flow, "GapWorld.play", PLAY_TESTS): [
        ("torch.arange(actions.shape[1]) <", "torch.arange(actions.shape[1]) <="),  # one too many
        ("**obs,", "**next_obs,"),                                         # sees the future
        ("take(row, playing)", "row"),                                     # rows after the end
        ("return self.success,", "return np.roll(self.success, 1),"),      # mixes up episodes
        ("torch.arange(len(mask))", "torch.arange(len(mask)).flip(0)"),    # rows of another
        ("playing = torch.from_numpy(~self.over)", "playing = torch.from_numpy(self.over.copy())"),
    ],
    (flow, "GapWorld.reset", (
        t1.test_starts_fill_their_range_evenly,
        t1.test_a_seed_starts_the_same_episode_in_any_company_and_after_any_other,
    )): [
        ("y * self.start_width", "y"),                                     # deaf to the width
        ("gap_y * 0.3", "y * 0.3"),                                        # the gap is opposite
        ("default_rng(seed)", "default_rng(seeds[0])"),                    # one start for all
        ("default_rng(seed)", "default_rng()"),                            # another every time
    ],
    (flow, "GapWorld.step", (
        t3.test_an_episode_that_first_succeeds_in_its_last_chunk_is_a_success, *PLAY_TESTS)): [
        ("self.success |= arrived", "self.success |= arrived & (self.steps < self.max_steps)"),
        ("self.success |= arrived", "self.success = arrived"),             # forgotten at the end
        ("executed + live", "executed + 1"),                               # counts what never ran
        ("* live[:, None]", ""),                                           # the finished move on
        ("np.clip(action, -1, 1)", "action"),                              # faster than allowed
        (">= self.max_steps", "> self.max_steps"),                         # a step too many
        ("> self.gap)", "> 2 * self.gap)"),                                # a wider gap
    ],
    (sde, "time_grid", (t2.test_the_grid_runs_from_noise_to_action_in_equal_steps,)): [
        ("(1, 0, num_steps + 1)", "(0, 1, num_steps + 1)"),                # time runs backwards
        ("(1, 0, num_steps + 1)", "(1, 0, num_steps)"),                    # one step too few
        ("(1, 0, num_steps + 1)", "(1, 0, num_steps + 2)[:-1]"),           # never reaches 0
    ],
    (sde, "noise_scale", (
        partial(t2.test_sigma_uses_the_next_grid_time_only_at_t_1_and_only_below, 4),
        t2.test_the_papers_stds,
    )): [
        ("torch.sqrt(", "("),                                              # missing square root
        ("torch.where(t == 1, t_next, t)", "t_next"),                      # next time everywhere
        ("torch.where(t == 1, t_next, t)", "t"),                           # infinite at t = 1
        ("torch.sqrt(t /", "torch.sqrt(torch.where(t == 1, t_next, t) /"),  # in the numerator too
        ("times[:-1], times[1:]", "times[1:], times[:-1]"),                # sigma of the wrong end
    ],
    (sde, "transition", (
        partial(t2.test_a_step_is_an_euler_step_plus_the_score, True),
        partial(t2.test_a_step_is_an_euler_step_plus_the_score, False),
        t2.test_the_mean_is_affine_in_the_velocity_with_slope_b,
        t2.test_gaussian_data_keeps_its_variance_all_along_the_corrected_path,
    )): [
        ("x_t - t_cur * v", "x_t + t_cur * v"),                            # velocity the other way
        ("(1 - t_cur) * v", "t_cur * v"),                                  # wrong time end
        ("sigma**2 * dt / (2 * t_cur)", "sigma**2 * dt / t_cur"),          # correction without 1/2
        ("sigma**2 * dt / (2 * t_cur)", "sigma * dt / (2 * t_cur)"),       # ... without the square
        ("(t_next - correction)", "(t_next + correction)"),                  # ... outwards
        ("(t_next - correction)", "t_next"),                                # ... missing
        ("if corrected else 0", "if not corrected else 0"),                # ... in the wrong branch
        ("sigma * dt**0.5", "sigma * dt"),                                 # missing square root
        ("sigma * dt**0.5", "sigma"),                                      # std that ignores dt
    ],
    (sde, "sde_sample", (
        t2.test_the_path_records_states_and_velocities,
        partial(t2.test_every_step_is_a_fresh_standard_normal_around_its_mean, True),
        partial(t2.test_every_step_is_a_fresh_standard_normal_around_its_mean, False),
        t2.test_two_modes_keep_their_distribution_under_the_corrected_sde,
        t2.test_each_row_and_step_can_have_a_noise_level_of_its_own,
        partial(t2.test_the_sampler_never_looks_into_the_context, "object"),
    )): [
        ("(times, noise_level)", "(times, torch.as_tensor(noise_level).mean())"),  # one for all
        ("torch.stack(vs, 1), sigmas)", "torch.stack(vs, 1), sigmas.flip(1))"),  # recorded wrongly
        ("sigmas[:, k, None, None]", "sigmas[:1, k, None, None]"),         # the first row's for all
        ("expand(B), ctx)", "expand(B), policy.encode(obs))"),             # encodes at every step
        ("std * torch.randn_like(mean)",
         "std * torch.randn_like(mean) * (k + 1 < num_steps)"),            # calm end
        ("std * torch.randn_like(mean)", "std * torch.rand_like(mean)"),   # the wrong noise
        ("std * torch.randn_like(mean)", "std * torch.randn_like(mean[:1])"),  # shared by the batch
        ("std * torch.randn_like(mean)", "std**2 * torch.randn_like(mean)"),   # variance for std
        ("std * torch.randn_like(mean)", "std * xs[0]"),                   # the same at every step
        ("sigmas[:, k, None", "sigmas[:, num_steps - 1 - k, None"),  # sigma of the wrong step
        ("xs.append(x_t)", "xs.append(mean)"),                             # before the noise
        ("times[k].expand", "times[k + 1].expand"),                      # velocity at the wrong t
        ("None], corrected)", "None])"),                   # the flag is ignored
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
    (loss, "step_error", ERROR_TESTS): [
        ("(std**2 + var_eps)).sum(-1)", "(std**2 + var_eps)).mean(-1)"),   # averaged, not summed
        ("(std**2 + var_eps)", "(std + var_eps)"),                         # std for variance
        ("(std**2 + var_eps)", "std**2"),                                  # divides by zero
        ("(std**2 + var_eps)", "var_eps"),                                 # every step weighs alike
        ("t_cur, t_next, sigma)\n", "t_cur, t_next, sigma, False)\n"),     # the uncorrected mean
        ("(x_next - mean).pow(2)", "(x_next - mean).abs()"),               # not squared
    ],
    (loss, "endpoint_error", ERROR_TESTS): [
        ("x_t - t_cur * v", "x_t - t_next * v"),                           # from the wrong t
        ("x_t - t_cur * v", "x_t - (t_cur - t_next) * v"),                 # an Euler step only
        ("(sigma**2 * (t_cur - t_next) + var_eps)", "1"),                  # every step weighs alike
        ("sigma**2 * (t_cur - t_next)", "sigma**2"),                       # sigma for std
        ("sigma**2 * (t_cur - t_next)", "(sigma * (t_cur - t_next))**2"),  # dt squared
        (".sum(-1)", ".mean(-1)"),                                         # averaged, not summed
    ],
    (loss, "step_nft_loss", LOSS_TESTS): [
        ("v_old.detach()", "v_old"),                                       # missing detach
        ("mirror(v_theta, v_old,", "mirror(v_theta.detach(), v_old,"),     # detach too many
        ("F.softplus(dpo_beta / 2", "F.softplus(-dpo_beta / 2"),           # wrong sign of y
        ("F.softplus(dpo_beta / 2", "F.softplus(dpo_beta"),                # twice too steep
        ("(E_pos - E_neg)),", "(E_neg - E_pos)),"),                        # swapped branches
        ("(error(v, x_t,", "(step_error(v, x_t,"),                         # deaf to error
        ("executed_mean(F.softplus(dpo_beta / 2 * y * (E_pos - E_neg)), mask)",
         "F.softplus(dpo_beta / 2 * y * (E_pos - E_neg)).mean()"),         # mask ignored
        ("executed_mean(F.softplus(dpo_beta / 2 * y * (E_pos - E_neg)), mask)",
         "(F.softplus(dpo_beta / 2 * y * (E_pos - E_neg)) * mask).sum() / mask.sum()"),  # long ones
        ("kl_weight * executed", "0 * executed"),                          # no pull to v_old
        ("executed_mean((v_theta - v_old).pow(2).mean(-1), mask)",
         "(v_theta - v_old).pow(2).mean()"),                               # masked ones pull too
        ("(v_theta - v_old).pow(2)", "(v_pos - v_old).pow(2)"),            # clipped, beta in it
        ("margin, count = y *", "margin, count = 1 *"),                    # deaf to y
        ("drift > max_drift", "drift < max_drift"),                        # the others
        ("(value * mask).sum() / count", "value.float().mean()"),  # metrics of the masked
    ],
    (loss, "executed_mean", (t3.test_the_executed_mean_is_the_slow_one, *LOSS_TESTS)): [
        ("(values * mask).sum(-1)", "values.sum(-1)"),                     # mask ignored
        ("actions.clamp(min=1)", "mask.shape[1]"),                         # short chunks weigh less
        ("per_row.sum() / (actions > 0).sum().clamp(min=1)", "per_row.mean()"),  # empty rows too
        ("(actions > 0).sum().clamp(min=1)", "(actions > 0).sum()"),       # 0 / 0
    ],
    (loss, "explore", (t3.test_a_rollout_records_the_noisy_steps_it_acted_on,
                       partial(t3.test_a_rollout_has_as_many_steps_as_asked, 3))): [
        ("policy.denormalise(x_0).cpu()", "x_0.cpu()"),                    # acts in flow units
        ("policy.denormalise(x_0).cpu()",
         "policy.denormalise(path.x[:, -2])"),                             # a step too early
        ("num_steps, noise_level)\n", "num_steps, 0.2)\n"),                # a deaf noise level
        ("num_steps, noise_level)\n", "4, noise_level)\n"),                # always four steps
        ("path._asdict()", "path._replace(v=path.v.flip(1))._asdict()"),   # v of the wrong step
        ("path._asdict()", "path._replace(x=path.x.flip(1))._asdict()"),   # the path backwards
        ("path._asdict()", "path._replace(sigma=path.sigma.flip(1))._asdict()"),
    ],
    (loss, "labels", (
        t3.test_labels_are_plus_and_minus_one_per_row,
        t3.test_grouped_labels_lose_the_mean_over_the_episodes_of_one_start,
    )): [
        (".float() * 2 - 1", ".float()"),                                  # 0 and 1
        (".float() * 2 - 1", ".float() * -2 + 1"),                         # wrong sign
        ("torch.as_tensor(success)", "torch.as_tensor(success).roll(1)"),  # off by one episode
        ("if group_size > 1:", "if group_size > 0:"),                      # nothing is left of y
        ("groups.mean(1, keepdim=True)", "groups.mean()"),                 # mean over all groups
        ("y.view(-1, group_size)", "y.view(group_size, -1)"),              # groups of strangers
        ("return y[episode]", "return y.repeat_interleave(2)[:len(episode)]"),  # rows of another
    ],
    (loss, "recorded_steps", UPDATE_TESTS): [
        ('x_next=batch["x"][rows, k + 1]', 'x_next=batch["x"][rows, k]'),  # x_next off by one
        ('v_old=batch["v"][rows, k]', 'v_old=batch["v"][rows, 0 * k]'),    # of the wrong step
        ('sigma=batch["sigma"][rows, k]', 'sigma=batch["sigma"][rows, 0 * k]'),
        ('x_0 = batch["x"][:, -1]', 'x_0 = batch["x"][:, -2]'),            # not the end
        ('batch["x"][:, -1].repeat_interleave(n, 0)', 'batch["x"][:, -1].repeat(n, 1, 1)'),
        ("t_next=times[k + 1]", "t_next=times[k]"),                        # time stands still
        ("batch[name].repeat_interleave(n, 0)",
         "batch[name].repeat(n, *[1] * (batch[name].dim() - 1))"),  # of another row
        ('("y", "mask")', '("y",)'),                                       # no mask
        ("x_t[:, j], t_cur[:, j], ctx)", "x_t[:, j], t_cur[:, 0], ctx)"),  # the first column's t
        ("x_t[:, j], t_cur[:, j], ctx)", "x_t[:, 0], t_cur[:, j], ctx)"),  # the first column's x_t
        ("x_t[:, j], t_cur[:, j], ctx)", "x_t[:, j], t_cur[:, j], policy.encode(batch))"),
    ],
    (loss, "update", UPDATE_TESTS): [
        ('"error": TARGETS[target], **loss_options}', '"error": TARGETS[target]}'),  # deaf
        ("TARGETS[target]", "step_error"),                                 # always the next step's
        ("range(epochs)", "range(1)"),                                     # always one epoch
        (".split(minibatch)", ".split(10**6)"),                            # no minibatches
        ("torch.randperm(", "torch.arange("),                              # never shuffled
        ('target=x_next if target == "next" else x_0', "target=x_next"),   # never the endpoint
        ('len(batch["y"])', 'len(batch["y"]) - 1'),                        # a row left out
    ],
    (loss, "optimise", UPDATE_TESTS): [
        ("optimizer.step()", "optimizer.step() or optimizer.step()"),      # two steps for one
        ("optimizer.zero_grad()", "pass"),                                 # gradients pile up
        ("parameters(), grad_clip", "parameters(), 1e9"),                  # no clipping
    ],
    (loss, "ema_decay", (t3.test_ema_decay_runs_a_half_cosine_from_start_to_end,)): [
        ("(1 + math.cos", "(1 - math.cos"),                                # from end to start
        ("math.cos(math.pi * iteration", "math.cos(2 * math.pi * iteration"),  # and back again
        ("(1 + math.cos(math.pi * iteration / iterations)) / 2",
         "(1 - iteration / iterations)"),                                  # a straight line
        ("math.pi * iteration / iterations", "math.pi * iteration / (iterations - 1)"),  # early
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
    (loss, "train_toy", (
        t3.test_train_toy_acts_with_the_ema_policy_on_fresh_seeds,
        t3.test_train_toy_takes_one_random_step_of_every_chunk,
        t3.test_train_toy_compares_the_episodes_of_one_start,
        t3.test_every_flag_reaches_its_function,
    )): [
        ("copy.deepcopy(sft), copy.deepcopy(sft)", "[copy.deepcopy(sft)] * 2"),  # old learns
        ("copy.deepcopy(sft), copy.deepcopy(sft)", "copy.deepcopy(sft), sft"),   # SFT is lost
        ("explore(old,", "explore(policy,"),                     # the learner acts
        ('episode_seeds("train",', 'episode_seeds("test",'),                 # trains on the test
        ("args.seed, iteration)", "args.seed, 0)"),                        # the same starts again
        ("np.repeat(starts, args.group_size)", "np.tile(starts, args.group_size)"),
        ("torch.randint(args.num_steps,", "torch.randint(args.num_steps - 1,"),  # skips the last k
        ('batch["episode"], args.group_size)', 'batch["episode"])'),       # deaf to the groups
        ("beta=args.beta,", "beta=1.0,"),                                  # deaf to a flag
    ],
    (workers, "ChunkEnv.step", (*(partial(tw.check_chunks, *z) for z in ((4, 1), (1, 4), (2, 3))),
                                tw.test_an_action_is_held_for_several_control_steps)): [
        ("if self.over:\n            break", "if False:\n            break"),  # moves on after it
        ("math.ceil(", "math.floor("),                                     # half an action is none
        ("taken / self.action_repeat", "taken"),                           # control steps
        (">= self.max_steps", "> self.max_steps"),                         # a step too many
        ("self.over = success or", "self.over = "),                        # success ends nothing
        ("if taken:", "if True:"),                                         # looks at the unmoved
        ("self.over and not success", "self.over"),                        # truncated by success
        ("np.repeat(chunk, self.action_repeat, axis=0)",
         "np.tile(chunk, (self.action_repeat, 1))"),                       # 1 2 1 2 for 1 1 2 2
    ],
    (workers, "ChunkEnv.reset", (
        tw.test_a_simulator_is_built_at_the_first_reset_with_a_seed_and_only_once,
        partial(tw.check_chunks, 4, 1), partial(tw.check_play, 3))): [
        ("if self.sim is None:", "if True:"),                              # built every time
        ("self.steps, self.over, self.obs = 0, False,", "self.over, self.obs = False,"),
        ("self.sim.reset(seed)", "self.sim.reset(0)"),                     # one start for all
    ],
    (workers, "ChunkEnv.change", (
        tw.test_a_change_makes_a_new_simulator_at_the_next_reset_and_adds_to_earlier_ones,)): [
        ("**changes), None", "**changes), self.sim"),                      # the old one plays on
        ("functools.partial(self.make_sim, **changes)", "self.make_sim"),  # deaf
        ("functools.partial(self.make_sim,", "functools.partial(getattr(self.make_sim, 'func', "
         "self.make_sim),"),                                               # earlier ones are lost
    ],
    (workers, "tokens", (tw.test_a_sentence_becomes_the_bytes_of_its_small_letters,)): [
        (".lower()", ""),                                                  # capitals differ
        (".ljust(128)", ""),                                               # lengths differ
        ("[:128]", "[-128:]"),                                             # the end of long ones
    ],
    (workers, "Workers.play", WORKER_TESTS): [
        ("torch.arange(actions.shape[1]) <", "torch.arange(actions.shape[1]) <="),  # one too many
        ("**obs,", "**{k: torch.as_tensor(v) for k, v in next_obs.items()},"),  # sees the future
        ("values[playing]", "values"),                                     # rows of the idle
        ('info["success"][over]', 'info["success"][over][::-1]'),          # mixes up processes
        ('info["success"][over]', "terminated[over] & False"),             # nobody succeeds
        (") & (episode >= 0)", ")"),                                       # the idle end as well
        ("seeds[e] if e >= 0 else 0", "int(e) if e >= 0 else 0"),          # indices for seeds
        ('{"reset_mask": fresh}', '{"reset_mask": fresh | (episode >= 0)}'),  # restarts everyone
        ("self.plays(slot, seeds[e])", "True"),                            # deaf to the pinning
        ("for e in waiting if", "for e in waiting[::-1] if"),              # the last one first
        ("np.flatnonzero(episode < 0):", "np.flatnonzero(episode < 0)[:1]:"),  # one at a time
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
    torch.manual_seed(0)
    np.random.seed(0)
    test()


def passes(test):
    try:
        run(test)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("module, name, tests", MUTANTS, ids=lambda x: x if type(x) is str else "")
def test_the_real_code_passes(module, name, tests):
    for test in tests:
        run(test)


@pytest.mark.parametrize("module, name, tests, code, mistake", [
    pytest.param(*function, *mutant, id=f"{function[1]}-{i}")
    for function, mutants in MUTANTS.items() for i, mutant in enumerate(mutants)])
def test_a_planted_mistake_is_caught(module, name, tests, code, mistake, monkeypatch):
    monkeypatch.setattr(*mutate(module, name, code, mistake))
    assert not all(passes(test) for test in tests), f"no test noticed {mistake!r} in {name}"


def test_every_core_function_has_three_mutants():
    core = {"flow_matching_loss", "noise_like_chunks", "ode_path", "evaluate", "GapWorld.play",
            "GapWorld.step", "time_grid", "noise_scale", "transition", "sde_sample", "mirror",
            "step_error", "endpoint_error", "step_nft_loss", "executed_mean", "explore", "labels",
            "recorded_steps", "update", "ema_decay", "ema_update", "train_toy", "ChunkEnv.step",
            "Workers.play"}
    assert core <= {name for _, name, _ in MUTANTS}
    assert all(len(mutants) >= 3 for mutants in MUTANTS.values())
