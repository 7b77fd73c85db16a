"""Do the tests of 04, 05, tools, policies and envs test? As test_mutants, with mistakes planted in
these: each must fail one of the tests listed with its function, none of which builds a simulator.

A mutant is a function, a method or a class with one snippet exchanged.
"""

import functools
import importlib

import pytest

import test_04_train_libero as t4
import test_05_train_maniskill as t5
import test_envs_libero as tl
import test_envs_pixel_gap as tp
import test_envs_workers as tw
import test_policies_small as ts
import test_tools_flags as tf
import test_tools_log as tg
import test_tools_ranks as tr
import test_tools_run as tu
from envs import libero, libero_demos, pixel_gap, workers
from policies import small
from test_mutants import mutate, passes, run_once
from tools import flags, log, ranks, run

partial = functools.partial


def in_a_folder(test):
    """The same test without its fixture tmp_path."""
    def alone():
        with tu.folder() as path:
            test(path)
    return alone


def patched(test):
    """The same test without its fixture monkeypatch."""
    def alone():
        with pytest.MonkeyPatch.context() as patch:
            test(patch)
    return alone


robot, compare, policies = map(importlib.import_module, (
    "04_train_libero", "05_train_maniskill", "policies"))

LIBERO_LOOP = t4.check_the_loop, t4.test_a_label_is_the_success_of_an_episode
MANISKILL_LOOP = (*(partial(t5.check_the_loop, algo) for algo in ("ppo", "stepnft")),
                  t5.test_a_label_is_the_success_of_an_episode)
LOOP_MUTANTS = [
    ("the learner acts", "explore(old,", "explore(policy,"),
    ("old and learner are one",
     "copy.deepcopy(sft), copy.deepcopy(sft)", "[copy.deepcopy(sft)] * 2"),
    ("the clone learns", "copy.deepcopy(sft), copy.deepcopy(sft)", "sft, copy.deepcopy(sft)"),
    ("the clone acts and follows",
     "copy.deepcopy(sft), copy.deepcopy(sft)", "copy.deepcopy(sft), sft"),
    ("old is validated", "validate(policy, f\"iteration", "validate(old, f\"iteration"),
    ("the clone is validated", "validate(policy, f\"iteration", "validate(sft, f\"iteration"),
    ("validated an iteration late", "(i + 1) % args.eval_every", "i % args.eval_every"),
    ("the last one is not validated", " or i + 1 == args.iterations", ""),
    ("old is saved as the learner", '{"policy": policy,', '{"policy": old,'),
    ("the learner is saved as old", '"old": old,', '"old": policy,'),
    ("the learning rate counts from 1", "1 - i / args.iterations", "1 - (i + 1) / args.iterations"),
    ("the learning rate stays", " * (1 - i / args.iterations)", ""),
    ("alpha counts from 1", "nft.ema_decay(i,", "nft.ema_decay(i + 1,"),
    ("alpha arrives too early", "nft.ema_decay(i, args.iterations,",
     "nft.ema_decay(i, args.iterations - 1,"),
    ("the learner follows old", "nft.ema_update(old, policy,", "nft.ema_update(policy, old,"),
    ("nobody follows", "nft.ema_update(old, policy, alpha)", "pass"),
    ("one random stream for all", "random_stream(args.seed, i)", "random_stream(args.seed, 0)"),
    ("one random stream for all runs", "random_stream(args.seed, i)", "random_stream(0, i)"),
    ("no random stream", "run.random_stream(args.seed, i)", "pass"),
    ("deaf to the noise level", "args.num_steps, args.noise_level)", "args.num_steps, 0.2)"),
    ("the optimiser holds the clone", "Adam(policy.parameters()", "Adam(sft.parameters()"),
]
UPDATES = {script: tuple(partial(check, script) for check in t4.UPDATE_CHECKS)
           for script in (robot, compare)}
UPDATE_MUTANTS = [
    ("the last step of a chunk is left out",
     "torch.arange(K).expand", "torch.arange(K - 1).expand"),
    ("one k for all rows", "torch.randint(K, (count, 1))",
     "torch.randint(K, (1, 1)).expand(count, 1)"),
    ("the last k is never drawn",
     "torch.randint(K, (count, 1))", "torch.randint(K - 1, (count, 1))"),
    ("always all steps", 'if args.transitions == "one":', "if False:"),
    ("always one epoch", "range(args.epochs)", "range(1)"),
    ("no minibatches", "count, args.minibatch", "count, 10**6"),
    ("dims that hardly move are credited, too",
     'credited(policy, steps["v_theta"], steps["v_old"])', 'steps["v_theta"]'),
    ("always the next step is explained", 'x_next if args.target == "next" else x_0', "x_next"),
    ("always the next step's error", "nft.TARGETS[args.target]", 'nft.TARGETS["next"]'),
    ("deaf to beta", "beta=args.beta, max", "beta=1.0, max"),
    ("deaf to max_drift", "max_drift=args.max_drift", "max_drift=0.5"),
    ("deaf to dpo_beta", "dpo_beta=args.dpo_beta", "dpo_beta=1.0"),
    ("no clipping", "grad_clip=1.0", "grad_clip=1e9"),
    ("encoded for every step", '"k": k}, ctx)', '"k": k}, policy.encode(part))'),
    ("the batch stays on the CPU",
     "ranks.to_device(flow.take(batch, rows), args.device)", "flow.take(batch, rows)"),
]
DEMOS = (
    tl.test_steps_that_do_nothing_are_kept_or_left_out,
    tl.test_demos_come_in_the_order_of_their_numbers,
    partial(tl.check_images_of_demos, False), partial(tl.check_images_of_demos, True),
)
PUSHES = (
    tl.test_a_demo_is_pushed_for_5_to_10_steps_in_one_direction_and_then_not,
    tl.test_a_demo_records_the_experts_action_and_not_what_pushed_it,
    tl.test_the_pushes_of_an_episode_hang_on_its_seed_alone,
    tl.test_a_new_demo_does_not_begin_with_the_last_ones_push,
    tl.test_without_a_demo_nothing_pushes_and_no_expert_is_asked,
)
SHARED = (
    tr.test_a_rank_plays_its_share_and_counts_its_episodes_among_all,
    tr.test_a_policy_sees_and_acts_on_its_device_and_a_world_on_the_cpu,
)
RANK_OF_A_MACHINE = (
    *(partial(tr.check_gpu_of_its_own, *case) for case in tr.GPUS),
    tr.test_who_says_where_to_draw_is_heard, tr.test_ranks_without_gpus_meet_over_gloo)
RUN_FLAGS = (tf.check_resume, tf.check_eval_only,
             tf.test_a_folder_that_holds_a_run_is_not_written_over,
             tf.test_a_checkpoint_of_another_script_is_refused)

# (module, function, the tests that watch it): [(what is wrong, the code, the mistake), ...]
MUTANTS = {
    (robot, "main", LIBERO_LOOP): [
        *LOOP_MUTANTS,
        ("old is tested", "policies[name] = policy", "policies[name] = old"),
        ("the same starts again",
         "args.seed, i, args.group_size)", "args.seed, 0, args.group_size)"),
        ("the starts of run 0", "args.episodes, args.seed, i,", "args.episodes, 0, i,"),
        ("a start for each episode", "args.seed, i, args.group_size)", "args.seed, i)"),
        ("labels deaf to the groups", 'batch["episode"], args.group_size)', 'batch["episode"])'),
        ("validated on training's starts",
         'random_starts(args, "validation"', 'random_starts(args, "train"'),
        ("labels of another episode", 'torch.as_tensor(success)[batch["episode"]]',
         'torch.as_tensor(success)[batch["episode"] - 1]'),
        ("two worlds at a time", "    world.close()\n", ""),
    ],
    (robot, "update", UPDATES[robot]): UPDATE_MUTANTS,
    (robot, "random_starts", (
        t4.test_ten_tasks_take_turns_and_groups_stay_together,
        t4.test_every_task_is_trained_when_an_iteration_has_fewer_starts_than_tasks,
        t4.check_the_loop)): [
        ("strangers in a group", "np.repeat(libero", "np.tile(libero"),
        ("every iteration begins with the same task",
         "np.roll(args.tasks, -iteration * len(starts))", "args.tasks"),
        ("a start for each episode of a group", "count // group_size, seed", "count, seed"),
        ("run and iteration are swapped", "seed, iteration)", "iteration, seed)"),
        ("one task after the other", "np.resize(np.roll(args.tasks,",
         "np.resize(np.roll(np.repeat(args.tasks, 2),"),
    ],
    (robot, "clone", (
        t4.test_an_action_that_is_held_is_the_mean_of_the_steps_that_it_replaces,)): [
        ("the first of the held steps", ".mean(2)", "[:, :, 0]"),
        ("held steps and actions are swapped", ".unflatten(1, (H, R)).mean(2)",
         ".unflatten(1, (R, H)).mean(1)"),
    ],
    (robot, "collect_demos", (t4.check_scripted_demos, t4.test_recorded_demos_are_read_as_asked)): [
        ("the same demos in every run", "10 * args.num_demos, args.seed", "10 * args.num_demos, 0"),
        ("demos from the starts of the test", 'episode_seeds("demo"', 'episode_seeds("test"'),
        ("no pushes", "demo_noise=args.demo_noise", "demo_noise=0.0"),
        ("the first task's demos for all",
         "random_start(task, starts) for", "random_start(args.tasks[0], starts) for"),
        ("no-ops are kept", "args.skip_no_ops", "False"),
    ],
    (robot, "make_world", (t4.test_a_world_is_made_as_the_flags_say,)): [
        ("tests end as early as training",
         "if test else args.max_steps", "if False else args.max_steps"),
        ("as many simulators to film as to train",
         "min(args.num_envs, args.video) if film else args.num_envs", "args.num_envs"),
        ("each action once", "action_repeat=args.action_repeat", "action_repeat=1"),
    ],
    (robot, "test_all", (
        t4.test_each_task_has_rows_of_its_own_in_the_test, t4.check_the_loop,
        t4.test_the_test_plays_official_and_random_starts_then_further_suites_official_ones)): [
        ("the clone is filmed", "*_, last = policies", "last, *_ = policies"),
        ("a row of a task counts all", "// libero.TASK == task", "// libero.TASK >= 0"),
        ("the starts of the validation", 'random_starts(args, "test"',
         'random_starts(args, "validation"'),
        ("RESULT tells the last suite",
         "rates.setdefault(name, rate)", "rates.update({name: rate})"),
        ("all suites have random starts", "if suite == args.suite:", "if True:"),
        ("training's time limit", "suite, test=True)", "suite)"),
        ("two worlds at a time", "world.close()  #", "pass  #"),
    ],
    (compare, "main", MANISKILL_LOOP): [
        *LOOP_MUTANTS,
        ("old is tested", "policies[args.algo] = policy", "policies[args.algo] = old"),
        ("the same starts again",
         "args.group_size, args.seed, i)", "args.group_size, args.seed, 0)"),
        ("strangers in a group", "np.repeat(starts", "np.tile(starts"),
        ("validated on the test", 'episode_seeds("validation"', 'episode_seeds("test"'),
        ("the critic learns at the policy's rate", '"lr": critic.lr', '"lr": args.lr'),
        ("the critic's rate falls", 'optimizer.param_groups[0]["lr"] =',
         'optimizer.param_groups[-1]["lr"] ='),
        ("the critic does not learn",
         'optimizer.add_param_group({"params": critic.parameters(), "lr": critic.lr})', "pass"),
        ("the critic is not saved", 'parts["critic"] = critic = Critic', "critic = Critic"),
        ("the critic hangs on what was drawn before", "torch.manual_seed(args.seed)", "pass"),
        ("the baselines' old policy lags", "alpha = 0.0", "alpha = 0.5"),
        ("the baselines explore like the method",
         "EXPLORE[args.algo]", "nft.explore"),
        ("the method explores like the baselines",
         "EXPLORE[args.algo]", "one_noisy_step"),
        ("labels deaf to the groups", 'batch["episode"], args.group_size)', 'batch["episode"])'),
    ],
    (compare, "update", UPDATES[compare]): UPDATE_MUTANTS,
    (compare, "one_noisy_step", (
        t5.test_flow_sde_has_noise_in_one_step_and_the_ode_elsewhere,)): [
        ("noise from k on", "== k[:, None]", ">= k[:, None]"),
        ("always the first step", "torch.randint(num_steps,", "torch.randint(1,"),
        ("acts in flow units", "policy.denormalise(x_0)", "x_0"),
    ],
    (compare, "advantages", (
        t5.test_ppos_advantages_are_normalised_gae_of_a_critic_that_knows_the_time,
        t5.test_grpos_advantages_are_normalised_differences_to_the_mean_of_a_start,
        t5.test_advantages_are_normalised_over_the_rows_of_all_ranks)): [
        ("a chunk that is cut is none", "-(-args.max_steps // args.horizon)",
         "args.max_steps // args.horizon"),
        ("each rank has a mean of its own", "A - ranks.gather(A).mean()", "A - A.mean()"),
        ("not less the mean", "A - ranks.gather(A).mean()", "A"),
        ("each rank has a scale of its own", "ranks.gather(A).std()", "A.std()"),
        ("GRPO is deaf to the groups", "args.group_size)", "1)"),
        ("the critic does not see the time", 'part["elapsed"]', '0 * part["elapsed"]'),
        ("returns are advantages", 'A, batch["returns"] = gae(', 'batch["returns"], A = gae('),
    ],
    (compare, "test_all", (
        t5.test_every_variant_is_played_by_every_policy_on_the_same_seeds,)): [
        ("OOD on the starts of the test", "args.ood_episodes, iteration=1)", "args.ood_episodes)"),
        ("a variant changes nothing", "world.change(changes=changes)", "world.change(changes={})"),
        ("the clone is filmed", "*_, last = policies", "last, *_ = policies"),
        ("as many episodes as the test", "args.ood_episodes,", "args.test_episodes,"),
        ("the world is left open", "    world.close()\n", ""),
    ],
    (compare, "clone", (
        t5.test_demos_are_the_first_successes_on_the_demo_starts_of_the_run_in_chunks,)): [
        ("the same demos in every run", "10 * args.num_demos, args.seed", "10 * args.num_demos, 0"),
        ("the expert's noise is lost", "demo_noise=args.demo_noise", "demo_noise=0.0"),
    ],
    (compare, "make_world", (t5.test_a_world_is_made_as_the_flags_say,)): [
        ("demos without an expert", "demos=demo_noise is not None", "demos=bool(demo_noise)"),
        ("states are drawn, too", 'if film or args.obs == "rgb" else None', "if True else None"),
    ],
    (run, "random_stream", (tu.test_an_iteration_has_a_random_stream_of_its_own_on_each_rank,)): [
        ("all ranks draw alike", " + rank_of()[0]", ""),
        ("all iterations draw alike", "seed, iteration)[0]", "seed, 0)[0]"),
        ("a rank draws as another in the next iteration",
         'int(episode_seeds("train", 1, seed, iteration)[0])', "seed + iteration"),
    ],
    (run, "count", (tu.test_an_iteration_is_counted_in_control_steps,)): [
        ("actions for control steps", " * args.action_repeat", ""),
        ("this rank's steps alone", 'gather(batch["mask"].sum()[None])', 'batch["mask"].sum()'),
        ("chunks for actions", 'batch["mask"].sum()', 'batch["mask"].any(1).sum()'),
        ("episodes of this iteration alone", 'state["iteration"] * args.episodes', "args.episodes"),
    ],
    (run, "begin", (
        tu.test_a_run_that_is_resumed_gets_every_part_back_and_repeats_no_row,
        tu.test_a_new_run_starts_at_zero_and_takes_away_the_log_of_one_that_never_saved)): [
        ("the last row is lost", '<= content["state"]', '< content["state"]'),
        ("a row comes twice", 'if int(row.split(",")[0]) <= content["state"]["iteration"]', ""),
        ("Adam forgets",
         "in parts.items():", 'in [p for p in parts.items() if "opt" not in p[0]]:'),
        ("old starts as the learner", "load_state_dict(content[name])",
         'load_state_dict(content["policy" if name == "old" else name])'),
        ("the log of an SFT run is lost", "if args.iterations:", "if True:"),
    ],
    (run, "sft", (
        tu.test_sft_trains_on_all_rows_of_all_demos_with_the_seeds_network_and_draws,
        tu.test_a_rank_starts_from_the_same_network_and_draws_rows_of_its_own)): [
        ("ranks draw the same rows", "args.seed + rank_of()[0]", "args.seed"),
        ("ranks have networks of their own", "torch.manual_seed(args.seed)\n",
         "torch.manual_seed(args.seed + rank_of()[0])\n"),
        ("the draws hang on what came before", "torch.manual_seed(args.seed)\n", "pass\n"),
        ("gradients stay", "policy.zero_grad()", "pass"),
        ("deaf to --sft-lr", "args.sft_lr,", "1e-3,"),
    ],
    (run, "film", (
        tu.test_a_film_shows_the_first_episodes_of_a_policy_without_noise_and_closes_its_world,)): [
        ("every episode is filmed", "args.device), seeds[:args.video]", "args.device), seeds"),
        ("the world is left open", "world.close()", "pass"),
    ],
    (run, "save", (tu.test_a_checkpoint_holds_the_policy_its_config_and_the_flags,)): [
        ("no more than the policy", "{**content, **more}", "content"),
        ("without its flags", '"flags": args.flags', '"flags": {}'),
    ],
    (ranks, "share", (tr.test_a_rank_plays_its_share_and_counts_its_episodes_among_all,)): [
        ("every rank has the first one's", "ranks)[rank]", "ranks)[0]"),
        ("every rank has all",
         "np.array_split(np.asarray(values), ranks)[rank]", "np.asarray(values)"),
    ],
    (ranks, "Shared", SHARED): [
        ("episodes count from this rank's first", 'rows["episode"] + own[0]', 'rows["episode"]'),
        ("successes of this rank alone", "gather(success), rows", "success, rows"),
        ("every rank plays all", "np.asarray(seeds)[own]", "np.asarray(seeds)"),
        ("the offset is the rank's number", "+ own[0]", "+ rank_of()[0]"),
    ],
    (ranks, "OnDevice.play", SHARED): [
        ("actions stay on the device", "actions.cpu()", "actions"),
        ("records stay on the device", 'to_device(record, "cpu")', "record"),
        ("the policy gets what is on the CPU", "act(to_device(obs, self.device))", "act(obs)"),
    ],
    (ranks, "minibatches", (
        tr.test_each_rank_takes_as_many_rows_as_the_one_with_fewest_and_random_ones,
        tr.test_one_rank_takes_every_row_once_in_an_epoch_in_random_order)): [
        ("the first rows, whatever the epoch", "torch.randperm(count)[:fewest]",
         "torch.randperm(fewest)"),
        ("the most, not the fewest", ".min())", ".max())"),
        ("in their order", "torch.randperm(count)", "torch.arange(count)"),
        ("one step an epoch", ".split(size)", ".split(count)"),
    ],
    (ranks, "average_gradients", (tr.test_a_gradient_is_the_mean_of_all_ranks,)): [
        ("the sum, not the mean", "parameter.grad /= rank_of()[1]", "pass"),
        ("its own", "dist.all_reduce(parameter.grad)", "pass"),
    ],
    (ranks, "join_ranks", RANK_OF_A_MACHINE): [
        ("all ranks on one GPU", 'f"cuda:{local}"', '"cuda:0"'),
        ("the rank of all machines", 'int(os.environ["LOCAL_RANK"])', 'int(os.environ["RANK"])'),
        ("simulators see every GPU", "show_gpu(local)", "pass"),
    ],
    (ranks, "show_gpu", RANK_OF_A_MACHINE): [
        ("CUDA's number for EGL's", "devices.index(int(name))", "int(name)"),
        ("deaf to the GPUs that are visible", 'visible.split(",")[local].strip()', "str(local)"),
        ("deaf to who says where to draw", ' and "MUJOCO_EGL_DEVICE_ID" not in os.environ', ""),
    ],
    (flags, "check_clone", (tf.check_clones,)): [
        ("less than all of the config is enough",
         "config != needed", "not config.items() <= needed.items()"),
        ("more than the config is no matter",
         "config != needed", "not needed.items() <= config.items()"),
        ("the kind alone counts", "config != needed", 'config["kind"] != needed.get("kind")'),
        ("anything goes", "config != needed", "False"),
    ],
    (flags, "Parser.refuse", (tf.test_a_flag_that_is_not_used_is_refused_if_it_was_given,)): [
        ("all that is set", "!= self.get_default(name)", "is not None"),
        ("the name as Python has it", "name.replace('_', '-')", "name"),
    ],
    (flags, "Parser.peek", tuple(partial(tf.check_peek, *case) for case in tf.PEEKS)): [
        ("shortened flags count", "allow_abbrev=False", "allow_abbrev=True"),
        ("the default of another", ".value", ".value or 'PickCube-v1'"),
    ],
    (flags, "parse_run", (
        *RUN_FLAGS, in_a_folder(tf.test_a_new_run_keeps_its_flags_as_numbers_and_words))): [
        ("nothing may change", "stored.keys() - FREE", "stored.keys()"),
        ("anything may change", "if getattr(args, name) != stored[name]:", "if False:"),
        ("a test is of all tasks", '{"tasks", "meshes"} if args', '{"meshes"} if args'),
        ("a run of other tasks goes on", ' if args.eval_only else set()', ""),
        ("a run is written over", "if not stored and", "if False and"),
        ("a clone is exchanged on the way", "if args.resume and args.sft:", "if False:"),
        ("the folder of the test is lost", "**stored, out=path.parent)", "**stored)"),
        ("resume is a flag, not a path", "args.resume and path", "args.resume"),
        ("paths are kept as paths", "str(value) if isinstance(value, Path) else value", "value"),
    ],
    (flags, "stored_flags", RUN_FLAGS): [
        ("simulators of another machine", '{"num_envs"} if args.eval_only else set()', "set()"),
        ("a run goes on with other simulators", '{"num_envs"} if args.eval_only else set()',
         '{"num_envs"}'),
        ("of any script", 'flags["script"] != parser.prog', "False"),
        ("films are made again", "OF_THE_CALL |", 'OF_THE_CALL - {"video"} |'),
    ],
    (flags, "check_method", tuple(partial(
        tf.test_numbers_that_contradict_each_other_are_one_line, *case) for case in (
            ("--episodes 12 --group-size 8", ["--episodes 12"]), ("--ema 0.9 0.1", ["--ema"])))): [
        ("equal ends are refused", "args.ema[0] > args.ema[1]", "args.ema[0] >= args.ema[1]"),
        ("groups may be cut", "args.episodes % args.group_size", "False"),
    ],
    (log, "log_row", (
        in_a_folder(tg.test_a_log_has_one_header_and_rounds_numbers_to_five_decimals),)): [
        ("a header for each row", "if file.tell() == 0:", "if True:"),
        ("three decimals", "round(v, 5)", "round(v, 3)"),
    ],
    (log, "draw_learning", (
        in_a_folder(tg.test_the_curves_show_every_rollout_each_evaluation_and_the_loss),)): [
        ("single episodes", 'log["episodes"] / 1000', 'log["episodes"]'),
        ("the two curves are swapped", 'log["train_sde"], color', 'log["eval_ode"], color'),
    ],
    (policies, "credited", (
        ts.test_credit_begins_at_a_tenth_of_the_range_of_an_action,
        ts.test_dims_that_hardly_move_in_the_demos_earn_no_credit,
        ts.test_a_policy_that_does_not_tell_its_range_gets_all_the_credit)): [
        ("credit for trembling", "> 0.1", "> 0.01"),
        ("credit for those that rest", "0.1, v_theta, v_old)", "0.1, v_old, v_theta)"),
        ("deaf to half_range", 'getattr(policy, "half_range", scale)', "scale"),
    ],
    (policies, "build_policy", tuple(
        partial(ts.test_a_policy_is_built_again_from_its_config, make)
        for make in (ts.small_image_policy, ts.slot_policy, ts.robot_policy))): [
        ("always the first kind", 'SMALL[config["kind"]]', 'SMALL["robot"]'),
        ("always the usual width", "(**options)", '(**{**options, "width": 512})'),
    ],
    (small, "spatial_softmax", (ts.test_a_feature_is_the_mean_position_of_its_map,)): [
        ("x and y are swapped", "chance.sum(2) @ x, chance.sum(3) @ y",
         "chance.sum(3) @ y, chance.sum(2) @ x"),
        ("the corner is 0", "torch.linspace(-1, 1, size", "torch.linspace(0, 1, size"),
    ],
    (small, "RobotPolicy.features", (ts.test_an_image_is_scaled_before_it_is_seen,)): [
        ("dark is 0", "/ 255 - 0.5", "/ 255"),
        ("bytes as they are", "images.float() / 255 - 0.5", "images.float()"),
    ],
    (small, "RobotPolicy.look", (ts.test_the_two_cameras_are_told_apart,)): [
        ("cameras are mixed", "self.features(rgb.flatten(0, 1)).view(-1, 128 * self.cameras)",
         "self.features(rgb.flatten(0, 1)).view(-1, self.cameras, 128).mean(1).repeat("
         "1, self.cameras)"),
    ],
    (small, "SlotPolicy.encode", (
        ts.test_the_sentence_alone_decides_which_slots_are_looked_at,
        partial(ts.test_the_state_comes_in_the_units_of_the_demonstrations, ts.slot_policy))): [
        ("metres", "10 * places", "places"),
        ("weights do not add up to one", ".softmax(-1)", ".sigmoid()"),
        ("places are squashed", 'obs["state"][:, -3 * self.slots:]',
         'torch.tanh(obs["state"][:, -3 * self.slots:])'),
        ("the robot's own state is lost",
         "own[:, :-3 * self.slots]", "0 * own[:, :-3 * self.slots]"),
    ],
    (libero, "heading", (
        *(partial(tl.test_a_heading_is_twice_the_angle_between_the_hand_and_the_axis_to_close_along,
                  angle) for angle in (0.4, 1.3)),
        tl.test_what_is_round_or_stands_or_is_no_thing_to_grasp_has_no_heading)): [
        ("the angle, not twice it", "x * x - y * y, 2 * x * y", "x, y"),
        ("cosine and sine are swapped", "x * x - y * y, 2 * x * y", "2 * x * y, x * x - y * y"),
        ("seen from the world", "hand_rot.T @ rot[:, axis]", "rot[:, axis]"),
        ("the hand's rotation the other way", "hand_rot.T @", "np.diag([1, -1, -1]) @"),
        ("a row of the rotation, not its axis", "rot[:, axis]", "rot[axis]"),
        ("always the same axis", "_, axis = look_up(GRASPS, name) or (None, None)",
         "axis = 1 if look_up(GRASPS, name) else None"),
    ],
    (libero, "LiberoSim.observe", (
        tl.test_a_state_has_the_hand_then_each_thing_in_its_order_then_zeros,
        tl.test_with_images_the_state_is_the_hand_alone)): [
        ("cosine of the yaw", "rot[1:2, 1]", "rot[0:1, 1]"),
        ("the other axis' height", "rot[1:2, 1]", "rot[2:3, 1]"),
        ("positions in the world", "pos - hand", "pos"),
        ("hand minus position", "pos - hand", "hand - pos"),
        ("in the order of the alphabet", "in self.entities", "in sorted(self.entities)"),
        ("nothing is ever open", "[opening]", "[0.0]"),
        ("the opening before the heading", "heading(name, turned, rot), [opening]",
         "[opening], heading(name, turned, rot)"),
        ("the hand's own rotation", "heading(name, turned, rot)", "heading(name, rot, turned)"),
        ("zeros in front",
         "(0, self.state_dim - len(values))", "(self.state_dim - len(values), 0)"),
        ("fingers the other way round", "self.data.qpos[self.finger_joints]",
         "self.data.qpos[self.finger_joints[::-1]]"),
    ],
    (libero, "LiberoSim.pose", (tl.test_the_pose_of_an_object_a_fixture_and_a_region,)): [
        ("a region's joints are nobody's", "region or fixture", "fixture"),
        ("a fixture's joints are nobody's", "region or fixture", "region"),
        ("the opening the other way", "opening = sum(", "opening = -sum("),
    ],
    (libero, "TaskSims.advance", PUSHES): [
        ("pushed for 5 to 9 steps", "integers(5, 11)", "integers(5, 10)"),
        ("pushed for 4 steps, too", "integers(5, 11)", "integers(4, 11)"),
        ("uniform pushes", "self.rng.standard_normal(3)", "self.rng.uniform(-1, 1, 3)"),
        ("deaf to demo_noise", "self.noise * self.rng", "0.5 * self.rng"),
        ("all that the hand does is pushed",
         "np.append(self.noise * self.rng.standard_normal(3), np.zeros(4))",
         "self.noise * self.rng.standard_normal(7)"),
        ("twice as often", "self.rng.random() < 0.1", "self.rng.random() < 0.2"),
        ("a new direction every step",
         "action = action + (self.left > 0) * self.push",
         "action = action + (self.left > 0) * np.append(self.noise * self.rng.standard_normal(3), "
         "np.zeros(4))"),
        ("pushed for ever", "max(0, self.left - 1)", "self.left"),
        ("the push stays", "(self.left > 0) * self.push", "self.push"),
        ("a push begins anew while one lasts", "self.left == 0 and", ""),
    ],
    (libero, "TaskSims.observe", PUSHES): [
        ("what is pushed is recorded", "self.expert.act(self.sim).astype(np.float32)",
         "(self.expert.act(self.sim) + (self.left > 0) * self.push).astype(np.float32)"),
    ],
    (libero, "TaskSims.reset", (
        *PUSHES, tl.test_a_seed_is_a_task_and_a_start_and_a_tasks_simulator_is_kept)): [
        ("the last push goes on", "default_rng(seed), 0, 0",
         'default_rng(seed), getattr(self, "left", 0), getattr(self, "push", 0)'),
        ("every demo is pushed alike", "default_rng(seed)", "default_rng(0)"),
        ("built for every episode", "if task not in self.sims:", "if True:"),
        ("the seed is the placement", "self.sim.reset(number)", "self.sim.reset(seed)"),
    ],
    (libero, "make_workers", (
        patched(tl.test_the_workers_of_a_run_are_told_what_they_will_see),)): [
        ("demos hold their actions", "box(-1, 1, (ACTION_DIM,)), 1",
         "box(-1, 1, (ACTION_DIM,)), action_repeat"),
        ("small films", "256 if film", "image_size if film"),
        ("a worker is not told of the noise", "TaskSims, suite, demo_noise,",
         "TaskSims, suite, None,"),
        ("tasks anywhere", "pinned(tasks, num_envs), episode_name",
         "lambda slot, seed: True, episode_name"),
    ],
    (libero_demos, "recorded_states", DEMOS): [
        ("what stands still is dropped, whatever the grip", "still & same_grip", "still"),
        ("what keeps its grip is dropped, too", "still & same_grip", "same_grip"),
        ("the two flags are swapped", "(not skip_no_ops)", "skip_no_ops"),
        ("no-ops stay", "~(still & same_grip) | (not skip_no_ops)", "still | True"),
        ("small movements are dropped", "< 1e-4", "< 1e-3"),
        ("nothing is small", "< 1e-4", "< 1e-6"),
        ("the hand may turn unseen", "actions[:, :6]", "actions[:, :3]"),
        ("the first step kept its grip", "np.append(False,", "np.append(True,"),
        ("the first step is always dropped", 'steps >= int(obs == "rgb")', "steps > 0"),
        ("the first step is never dropped", 'steps >= int(obs == "rgb")', "steps >= 0"),
        ("the first actions", "seen, actions[steps])", "seen, actions[:len(steps)])"),
    ],
    (libero_demos, "recorded_images", DEMOS): [
        ("the image after", 'steps - int("model_file" in demo.attrs)', "steps"),
        ("upside down", "::-1, ::-1]", "::1, ::-1]"),
        ("the cameras are swapped", "in CAMERAS", "in CAMERAS[::-1]"),
    ],
    (libero_demos, "demo_names", DEMOS): [
        ("10 before 2", "key=lambda name: int(numbers[name][1])", "key=str"),
        ("from behind", "return found", "return found[::-1]"),
    ],
    (libero_demos, "recorded_demos", DEMOS): [
        ("all demos of the file", "[:num_demos]", ""),
        ("the things are seen beside the images", "state_size(suite, obs)", "state_size(suite)"),
    ],
    (workers, "ChunkEnv.shoot", (tw.check_films,)): [
        ("written at every step", "if self.over:", "if True:"),
        ("outcomes are swapped", "'success' if success else 'failure'",
         "'failure' if success else 'success'"),
        ("only the last picture", "self.frames.append(self.sim.look())",
         "self.frames = [self.sim.look()]"),
    ],
    (workers, "ChunkEnv.reset", (tw.check_films, partial(tw.check_chunks, 2, 3))): [
        ("a film begins with the last one", "self.frames = []",
         'self.frames = getattr(self, "frames", [])'),
        ("over before it begins",
         "self.over, self.obs = 0, False,", "self.over, self.obs = 0, True,"),
    ],
    (workers, "ChunkEnv.step", (tw.check_films, *(partial(tw.check_chunks, *z) for z in (
            (4, 1), (2, 3))))): [
        ("the last picture is missing", "if self.film:", "if self.film and not self.over:"),
        ("what ran is a whole chunk", "math.ceil(taken / self.action_repeat)", "len(chunk)"),
    ],
    (workers, "scripted_demos", (
        tw.test_scripted_demos_keep_the_first_successes_of_each_task,
        tw.test_no_candidate_is_tried_that_is_not_needed)): [
        ("failures are shown, too", "np.flatnonzero(success)", "range(len(success))"),
        ("one at a time", "islice(candidates[task], n)", "islice(candidates[task], 1)"),
        ("the rows of another", "values[episode == e]", "values[episode == 0]"),
        ("the world is left open", "world.close()", "pass"),
        ("a mask is an observation", 'rows.pop("episode"), rows.pop("mask")',
         'rows.pop("episode"), 0'),
    ],
    (workers, "follow_expert", (tw.test_scripted_demos_keep_the_first_successes_of_each_task,)): [
        ("half of it", 'obs["action"][:, None]', '0.5 * obs["action"][:, None]'),
    ],
    (pixel_gap, "picture", tuple(partial(tp.test_a_wall_pixel_is_as_white_as_the_wall_covers_it, y)
                                 for y in (-0.3, 0.125))): [
        ("upside down", "np.linspace(1, -1, PIXELS + 1)", "np.linspace(-1, 1, PIXELS + 1)[::1]"),
        ("all or nothing", "np.clip(covered / (2 / PIXELS), 0, 1)", "(covered > 0)"),
        ("a wall of one pixel", "PIXELS // 2 + 1)", "PIXELS // 2)"),
    ],
    (pixel_gap, "PixelGap.reset", (
        tp.test_the_variants_change_what_they_say_and_nothing_else,
        tp.test_a_seed_is_an_episode_alone_and_in_company)): [
        ("gaps that are unseen are seen", 'if self.gaps == "seen":', "if True:"),
        ("starts from the middle", "low + (high - low) * np.abs(y)", "high * np.abs(y)"),
        ("one scene for all", "int(rng.integers(self.scenes)) for rng in rngs",
         "int(rngs[0].integers(self.scenes)) for rng in rngs"),
    ],
}


@pytest.mark.parametrize("module, name, tests", MUTANTS, ids=lambda x: x if type(x) is str else "")
def test_the_real_code_passes(module, name, tests):
    for test in tests:
        run_once(test)


@pytest.mark.parametrize("module, name, tests, what, code, mistake", [
    pytest.param(*function, *mutant, id=f"{function[0].__name__}-{function[1]}-{i}")
    for function, mutants in MUTANTS.items() for i, mutant in enumerate(mutants)])
def test_a_planted_mistake_is_caught(module, name, tests, what, code, mistake, monkeypatch):
    monkeypatch.setattr(*mutate(module, name, code, mistake))
    assert not all(passes(test) for test in tests), f"no test noticed {what!r} in {name}"
