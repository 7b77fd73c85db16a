"""04 - From the toy to a robot: pi-StepNFT on LIBERO, from a few demonstrations.

The method of 03 on the benchmark of the paper: pick and place with a Panda arm. A scripted
controller (or LIBERO's recorded files) gives a few demonstrations, flow matching clones them (SFT),
and reinforcement learning lifts the clone:

    explore (02) -> label by success -> update (03: one-step ranking) -> EMA -> evaluate

New since 03: a policy that sees images and reads a sentence, demonstrations, a run that can stop
and go on, several GPUs, tests in and out of distribution. The simulators live in envs/. All that
comes before LIBERO, near the end, serves 05 too.

Defaults that differ from the paper's, because two CPU cores are not a GPU cluster: a chunk is one
action, held for 4 control steps, so that an episode's success hangs on a quarter of the random
numbers; all K denoising steps of a chunk are trained on; labels are centred on the 8 episodes from
one start; noise 0.5, because most of it is contracted away before it reaches the arm (notebook
exploration_width); slope 0.1 of the ranking, which holds the policy back less; the old policy
follows quickly. Each is a flag. Always: the learning rate falls to 0, and action dims that hardly
move in the demos earn no credit. --policy brings the paper's kind of network, a pi0
(policies/pi0.py), in the place of the small one below.

Run:     python 04_train_libero.py --num-demos 1 --seed 2     (task 0, 17 minutes on two cores)
         python 04_train_libero.py --eval-only runs/04_train_libero/last.pt --video 4
         torchrun --nproc-per-node=8 04_train_libero.py --obs rgb --tasks all --episodes 512
Prints:  success of SFT and of every evaluation with its 95 % interval, then RESULT.
Saves:   runs/04_train_libero/{sft.pt, last.pt, log.csv, test.csv, learning.png, videos/}
"""

import argparse
import copy
import datetime
import importlib
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from envs import libero
from policies import pi0

flow = importlib.import_module("01_flow_policy")
nft = importlib.import_module("03_step_loss")

# ------------------------------------------------------------------------------------------------
# The policy: FlowPolicy of 01 with eyes and a sentence. Only `encode` is new.


class RobotPolicy(flow.FlowPolicy):
    """FlowPolicy that may also see images, rgb (B, cameras, 3, h, w) uint8, and read a sentence,
    tokens (B, L) uint8, its bytes.

    The last 3 * `slots` numbers of the state are positions (m) of things that the sentence may
    name: it decides which are looked at (05's PutOnPad). small_images: 16 x 16 pixels, the same
    picture in many rows (05's PixelGap).
    """

    def __init__(self, horizon, action_dim, state_dim, cameras=0, language=False, slots=0,
                 width=512, depth=3, small_images=False):
        config = dict(horizon=horizon, action_dim=action_dim, state_dim=state_dim, cameras=cameras,
                      language=language, slots=slots, width=width, depth=depth,
                      small_images=small_images)
        # two numbers for each of 64 feature maps, 64 a sentence, three a head of attention
        context = state_dim - 3 * slots + 128 * cameras + 64 * language + 12 * (slots > 0)
        super().__init__(horizon, action_dim, context, width, depth)
        self.config, self.context_dim = config, context  # config rebuilds it from a checkpoint
        self.cameras, self.language, self.slots = cameras, language, slots
        self.small_images = small_images
        self.state_centre, self.state_scale = torch.zeros(state_dim), torch.ones(state_dim)
        if small_images:
            self.image_encoder = nn.Sequential(nn.Conv2d(3, 32, 5), nn.SiLU(),
                                               nn.Conv2d(32, 64, 3))
        elif cameras:  # one net, shared by the cameras
            self.image_encoder = nn.Sequential(
                nn.Conv2d(3, 32, 7, stride=2), nn.SiLU(), nn.Conv2d(32, 32, 3, stride=2),
                nn.SiLU(), nn.Conv2d(32, 32, 3), nn.SiLU(), nn.Conv2d(32, 64, 3))
        if language:  # a convolution that sees five bytes at a time, then the maximum
            self.byte_embedding = nn.Embedding(256, 32)
            self.sentence_encoder = nn.Conv1d(32, 64, 5, padding=2)
        if slots:  # four heads of attention, each a softmax over the slots
            self.attention = nn.Linear(64, 4 * slots)

    def encode(self, obs):
        """obs -> ctx (B, C), everything about the observation that the velocity needs."""
        state = super().encode(obs)                                          # (B, S)
        parts = [state[:, :state.shape[1] - 3 * self.slots]]
        if self.cameras:
            images, which = obs["rgb"].flatten(0, 1), slice(None)            # (B*cameras, 3, h, w)
            if self.small_images:  # an episode's picture does not change: each is encoded once
                images, which = images.unique(dim=0, return_inverse=True)
            images = images.float() / 255 - 0.5
            # half precision for the images; the head keeps 32 bits, RL compares close velocities
            with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
                maps = self.image_encoder(images)                            # (B*cameras, 64, ..)
            parts.append(spatial_softmax(maps.float())[which].view(-1, 128 * self.cameras))
        if self.language:
            sentences, which = obs["tokens"].unique(dim=0, return_inverse=True)  # each read once
            letters = self.byte_embedding(sentences.long()).transpose(1, 2)
            text = self.sentence_encoder(letters).amax(-1)[which]                # (B, 64)
            parts.append(text)
        if self.slots:
            weights = self.attention(text).view(-1, 4, self.slots).softmax(-1)
            places = obs["state"][:, -3 * self.slots:].view(-1, self.slots, 3)
            parts.append(10 * (weights @ places).flatten(1))      # (B, 12), decimetres: order 1
        return torch.cat(parts, dim=-1)


def spatial_softmax(maps):
    """Feature maps (N, C, h, w) -> the point each looks at, x and y in [-1, 1]: (N, 2 C). A map
    becomes a probability over pixels, and its mean position the feature (Levine et al. 2016)."""
    height, width = maps.shape[2:]
    chance = maps.flatten(2).softmax(-1).view_as(maps)
    x, y = (torch.linspace(-1, 1, size, device=maps.device) for size in (width, height))
    return torch.cat([chance.sum(2) @ x, chance.sum(3) @ y], dim=-1)


# ------------------------------------------------------------------------------------------------
# Several GPUs: `torchrun --nproc-per-node=N` starts N ranks. Each plays its share of the episodes
# and learns from its own rows; gradients are averaged as backward makes them.


def join_ranks(args):
    """Under torchrun meets the other ranks and sets args.device. Rank 0 alone prints and writes:
    the others get a folder that is thrown away."""
    if "RANK" not in os.environ:
        return
    cuda, local = args.device == "cuda", int(os.environ["LOCAL_RANK"])
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                            timeout=datetime.timedelta(hours=2))
    if cuda:
        torch.cuda.set_device(local)
        args.device = f"cuda:{local}"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(local + 1)))
        # its simulators, started later, see this GPU only and draw there
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local]
        os.environ["MUJOCO_EGL_DEVICE_ID"] = visible.split(",")[local]
    if dist.get_rank():
        args.scratch = tempfile.TemporaryDirectory()
        sys.stdout, args.out = open(os.devnull, "w"), Path(args.scratch.name)


def rank_of():
    """-> (rank, number of ranks); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(values):
    """The part of a list that belongs to this rank."""
    rank, ranks = rank_of()
    return np.array_split(np.asarray(values), ranks)[rank]


def gather(values):
    """Arrays or tensors of all ranks, one after the other: undoes `share`."""
    parts = [values]
    if dist.is_initialized():
        parts = [None] * rank_of()[1]
        dist.all_gather_object(parts, values)
    return (torch.cat if torch.is_tensor(values) else np.concatenate)(parts)


def average_gradients(module):
    """From now on every backward leaves the mean of all ranks' gradients."""
    def average(parameter):
        dist.all_reduce(parameter.grad)
        parameter.grad /= rank_of()[1]

    for parameter in module.parameters() if dist.is_initialized() else []:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average)


def equal_rows(batch):
    """Each rank keeps as many rows, at random, as the one with fewest: as many steps on each."""
    count = len(batch["y"])
    fewest = int(gather(torch.tensor([count])).min())
    return flow.take(batch, torch.randperm(count)[:fewest]) if fewest < count else batch


# ------------------------------------------------------------------------------------------------
# Demonstrations and SFT


def follow(obs):
    """The scripted expert's action, which the observation holds, as a chunk of one."""
    return obs["action"][:, None], {}


def scripted_demos(world, candidates, num_demos):
    """The expert's first num_demos successes in each task -> [(rows, actions (T, A)), ...].

    candidates: for each task, the seeds to try in this order.
    """
    demos, missing = [], {task: num_demos for task in range(len(candidates))}
    candidates = [iter(seeds) for seeds in candidates]
    while missing:
        tries = [(task, seed) for task, n in missing.items()
                 for seed in itertools.islice(candidates[task], n)]
        if not tries:
            raise SystemExit(f"--num-demos {num_demos}: the expert failed too often; use less "
                             "--demo-noise or more --max-steps")
        success, rows = world.play(follow, [seed for _, seed in tries])
        for e in np.flatnonzero(success):
            demo = flow.take(rows, rows["episode"] == e)
            demos.append((demo, demo.pop("action")))
            missing[tries[e][0]] -= 1
        missing = {task: n for task, n in missing.items() if n}
    world.close()
    return demos


def clone(args, make_policy, collect_demos):
    """The SFT policy: this run's (--resume), another run's (--sft), or trained on demos."""
    if args.resume or args.sft:
        policy = load_policy(args.sft or args.resume.parent / "sft.pt", args.device)
        policy.micro_batch = getattr(args, "micro_batch", None)  # of pi0: the machine's business
    else:
        demos, H, R = collect_demos(args), args.horizon, args.action_repeat
        # an action that is held for R steps does what the demo did in them, on average
        chunks = torch.cat([flow.sliding_chunks(actions, H * R).unflatten(1, (H, R)).mean(2)
                            for _, actions in demos])
        print(f"{len(demos)} demos, {len(chunks)} chunks of {H} actions", flush=True)
        obs = {name: torch.cat([rows[name] for rows, _ in demos]) for name in demos[0][0]}
        torch.manual_seed(args.seed)
        policy = make_policy(args).to(args.device)
        average_gradients(policy)
        torch.manual_seed(args.seed + rank_of()[0])  # each rank draws minibatches of its own
        loss = flow.train_sft(policy, obs, chunks, args.sft_steps, args.sft_lr, args.sft_batch)
        policy.zero_grad()  # frees the gradients
        print(f"SFT: flow matching loss {loss:.3f}")
    save(args.out / "sft.pt", policy, args)
    return policy


# ------------------------------------------------------------------------------------------------
# A run: train, its checkpoints and its log. 05 uses all of it.


def credited(policy, v_theta, v_old):
    """v_theta in the action dims whose range in the demos is over a tenth of [-1, 1], v_old in the
    others: they hardly move, so their noise changes nothing and earns nothing."""
    moves = getattr(policy, "action_scale", torch.ones(1, device=v_old.device)) > 0.1
    return torch.where(moves, v_theta, v_old)


class StepNFT:
    """The method as `train` uses it: how to explore, and what to learn from the episodes."""
    name = "pi-StepNFT"
    beside = ()  # modules that learn beside the policy and are saved with it: a critic, say

    def __init__(self, args):
        self.args = args

    def explore(self, old):
        return nft.explore(old, self.args.num_steps, self.args.noise_level)

    def learn(self, policy, optimizer, batch, success):
        """Labels and minibatch steps -> info."""
        args, rows = self.args, len(batch["x"])
        batch["y"] = nft.labels(success, batch["episode"], args.group_size)
        batch["k"] = torch.arange(args.num_steps).expand(rows, -1)
        if args.transitions == "one":
            batch["k"] = torch.randint(args.num_steps, (rows, 1))

        def loss(v_theta, v_old, **steps):
            return nft.step_nft_loss(credited(policy, v_theta, v_old), v_old, **steps)

        return nft.update(policy, optimizer, equal_rows(batch), epochs=args.epochs, loss=loss,
                          minibatch=args.minibatch, target=args.target, beta=args.beta,
                          max_drift=args.max_drift, dpo_beta=args.dpo_beta)

    def decay(self, iteration):  # alpha: how much of the acting policy stays
        return nft.ema_decay(iteration, self.args.iterations, *self.args.ema)


def train(args, sft, world, method, start_seeds, validate):
    """Reinforcement learning from a clone -> (trained policy, control steps that were played).

    start_seeds(iteration) -> seeds of its episodes; validate(policy, name) -> success rate.
    """
    policy, old = copy.deepcopy(sft), copy.deepcopy(sft)  # policy learns, old acts
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    for module in method.beside:
        optimizer.add_param_group({"params": module.parameters(), "lr": module.lr})
    parts = {"policy": policy, "old": old, "optimizer": optimizer,
             **{f"beside{i}": module for i, module in enumerate(method.beside)}}
    for module in (policy, *method.beside):
        average_gradients(module)
    state = {"iteration": 0, "env_steps": 0}
    if args.resume:
        state = load_run(args, parts)
    elif args.iterations:
        (args.out / "log.csv").unlink(missing_ok=True)  # of a run that never had a checkpoint
        validate(sft, "SFT")

    while state["iteration"] < args.iterations:
        start, i = time.time(), state["iteration"]
        # a random stream of its own for each iteration and rank: a resumed run repeats it
        torch.manual_seed(int(flow.episode_seeds("train", 1, args.seed, i)[0]) + rank_of()[0])
        print(f"iteration {i + 1}/{args.iterations}", flush=True)
        success, batch = world.play(method.explore(old), share(start_seeds(i)))
        played = time.time()
        optimizer.param_groups[0]["lr"] = args.lr * (1 - i / args.iterations)  # smaller steps late
        info = method.learn(policy, optimizer, batch, success)
        alpha = method.decay(i)
        nft.ema_update(old, policy, alpha)
        updated = time.time()
        actions = gather(batch["mask"].sum()[None]).sum()
        state["env_steps"] += int(actions) * args.action_repeat  # a success may cut the last short
        state["iteration"], rate = i + 1, ""
        if (i + 1) % args.eval_every == 0 or i + 1 == args.iterations:
            rate = validate(policy, f"iteration {i + 1}")
        nft.log_row(args.out / "log.csv", {
            "iteration": i + 1, "episodes": (i + 1) * args.episodes,
            "env_steps": state["env_steps"], "train_sde": gather(success).mean(),
            "eval_ode": rate, **info, "alpha": alpha, "rollout_seconds": played - start,
            "update_seconds": updated - played})
        save(args.out / "last.pt", policy, args, state=state,
             **{name: part.state_dict() for name, part in parts.items() if name != "policy"})
    if args.iterations:
        fig, axes = flow.pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
        nft.draw_learning(nft.read_log(args.out / "log.csv"), *axes)
        fig.savefig(args.out / "learning.png", dpi=120)
    return policy, state["env_steps"]


def save(path, policy, args, **more):
    """A policy and the flags it was trained with: the whole file or none."""
    content = {"config": policy.config, "policy": policy.state_dict(), "flags": args.flags}
    torch.save({**content, **more}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_policy(path, device="cpu"):
    """-> the policy of any checkpoint of `save`; pi0's needs the folder it was made from, too."""
    content = torch.load(path, map_location=device, weights_only=True)
    kind = pi0.PI0Policy if "folder" in content["config"] else RobotPolicy
    policy = kind(**content["config"]).to(device)
    policy.load_state_dict(content["policy"])
    return policy


def load_run(args, parts):
    """Puts last.pt back into the parts of a run -> its state. A row that was logged just before the
    run was killed, and is about to come again, is taken out of the log."""
    content = torch.load(args.resume, map_location=args.device, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(content[name])
    header, *rows = (args.resume.parent / "log.csv").read_text().splitlines(keepends=True)
    done = [row for row in rows if int(row.split(",")[0]) <= content["state"]["iteration"]]
    (args.out / "log.tmp").write_text(header + "".join(done))
    os.replace(args.out / "log.tmp", args.out / "log.csv")
    return content["state"]


def evaluate(policy, world, seeds, num_steps):
    """`evaluate` of 01, each rank on its share of the episodes."""
    return gather(flow.evaluate(policy, world, share(seeds), num_steps))


def rated(success):
    """Successes -> the columns of a table: their rate with its 95 % Wilson interval."""
    import scipy.stats  # not at the top: every worker process would load it
    test = scipy.stats.binomtest(int(np.sum(success)), len(success))
    low, high = test.proportion_ci(0.95, method="wilson")
    return {"episodes": len(success), "success": float(np.mean(success)), "low": low, "high": high}


def report(name, success):
    """Prints a success rate with its interval -> the rate."""
    print("{}: success {success:.3f} [{low:.3f}, {high:.3f}] over {episodes} episodes".format(
        name, **rated(success)), flush=True)
    return float(np.mean(success))


# ------------------------------------------------------------------------------------------------
# The flags of a run. With --resume or --eval-only they come from the checkpoint.


def checkpoint(text):
    """A flag's type: a file that `save` wrote."""
    try:
        content = torch.load(text, map_location="cpu", weights_only=True)
        content["config"], content["policy"], content["flags"]
    except FileNotFoundError:
        raise argparse.ArgumentTypeError(f"{text}: no such file; train first") from None
    except Exception:  # torch raises many kinds for a file that is something else
        raise argparse.ArgumentTypeError(f"{text} is not a checkpoint of this repo") from None
    return Path(text)


# Of a checkpoint's flags, what belongs to the machine or the call, and what may change in a run
OF_THE_CALL = {"script", "out", "resume", "eval_only", "device", "video", "sft"}
FREE = {"iterations", "eval_every", "eval_episodes", "test_episodes", "test_states",
        "test_max_steps", "eval_suites", "eval_ood", "ood_episodes", "num_envs", "micro_batch"}


def add_run_flags(parser, envs_per_core, **defaults):
    """Demos, training, evaluation and logs of 04 and 05."""
    add, positive_int, natural = parser.add_argument, flow.positive_int, flow.natural
    # torchrun's ranks on one machine share its cores
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    add("--num-demos", type=positive_int, default=20, help="demonstrations per task for SFT")
    add("--demo-noise", type=flow.number(float, 0), default=0.1, help="noise on demo actions")
    add("--sft-steps", type=positive_int, default=1000, help="optimisation steps of flow matching")
    add("--sft-lr", type=flow.positive_float, default=1e-3, help="AdamW's, falling to 0")
    add("--sft-batch", type=positive_int, default=256, help="rows of each of these steps")
    add("--sft", type=checkpoint, metavar="FILE", help="start from another run's sft.pt")
    add("--iterations", type=natural, default=20, help="RL iterations; 0: SFT only")
    add("--episodes", type=positive_int, default=256, help="episodes per iteration, all tasks")
    add("--max-steps", type=positive_int, help="time limit of an episode, in control steps")
    add("--horizon", type=positive_int, default=4, help="H, actions per chunk")
    add("--transitions", default="all", choices=["all", "one"],
        help="train on all K denoising steps of a chunk, or on one at random (the paper)")
    add("--lr", type=flow.positive_float, default=3e-4, help="Adam's, falling linearly to 0")
    add("--epochs", type=positive_int, default=3, help="passes over each batch")
    add("--minibatch", type=positive_int, default=512, help="chunks per step, on each rank")
    add("--eval-every", type=positive_int, default=5, help="iterations between validations")
    add("--eval-episodes", type=positive_int, default=200, help="episodes per validation")
    add("--test-episodes", type=positive_int, default=200, help="episodes of the final test")
    add("--num-envs", type=positive_int, default=envs_per_core * max(cores, 1),
        help="simulators at a time, for each rank of torchrun")
    devices = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    add("--device", choices=devices, default=devices[0], help="of the policy")
    add("--seed", type=natural, default=0, help="seed of demos, SFT, rollouts and updates")
    add("--out", type=Path, default="runs", help="folder of logs and checkpoints")
    add("--video", type=natural, default=0, metavar="N", help="film N test episodes as mp4")
    add("--resume", action="store_true", help="continue the run in --out, with its flags")
    add("--eval-only", type=checkpoint, metavar="FILE", help="test this policy and stop")
    nft.add_method_flags(parser)
    parser.set_defaults(**defaults)


def parse_run(parser, argv=None):
    """Flags, checked: a new run's; or with --resume and --eval-only those of the checkpoint, which
    need not be repeated and may not be contradicted."""
    args, stored = parser.parse_args(argv), {}
    path = args.eval_only or args.resume and args.out / "last.pt"
    if path:
        missing = [name for name in ("last.pt", "sft.pt", "log.csv")
                   if args.resume and not (args.out / name).exists()]
        if missing:
            parser.error(f"--resume: {args.out} has no {', '.join(missing)}; leave --resume out")
        try:
            flags = torch.load(checkpoint(path), map_location="cpu", weights_only=True)["flags"]
        except argparse.ArgumentTypeError as error:
            parser.error(f"--resume: {error}")
        if flags["script"] != parser.prog:
            parser.error(f"{path} was trained by {flags['script']}")
        # a resumed run repeats what it would have done only with as many simulators
        leave = OF_THE_CALL | ({"num_envs"} if args.eval_only else set())
        stored = {name: flags[name] for name in flags.keys() - leave}
        parser.set_defaults(**stored, out=path.parent)
        args = parser.parse_args(argv)
    for name in stored.keys() - FREE - ({"tasks"} if args.eval_only else set()):
        if getattr(args, name) != stored[name]:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: {path} was trained "
                         f"with {stored[name]}; leave the flag out")
    nft.check_method(parser, args)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if args.episodes % (ranks * args.group_size):
        parser.error(f"--episodes {args.episodes}: {ranks} ranks of groups need a multiple of "
                     f"{ranks * args.group_size}")
    if min(args.eval_episodes, args.test_episodes, vars(args).get("ood_episodes", ranks)) < ranks:
        parser.error(f"--eval-episodes, --test-episodes, --ood-episodes: give {ranks}, one a rank")
    if args.resume and args.sft:
        parser.error("--sft: a run that goes on with --resume has its clone already")
    if not stored and (args.out / "last.pt").exists():
        parser.error(f"--out {args.out} holds a run: --resume continues it, another --out keeps it")
    args.resume = args.resume and path
    args.flags = {"script": parser.prog, **{name: str(value) if isinstance(value, Path) else value
                                            for name, value in vars(args).items()}}
    return args


def check_clone(parser, args, make_policy):
    """--sft must hold a policy of the kind that this run would train."""
    if args.sft:
        config, needed = load_policy(args.sft).config, make_policy(args).config
        if config != needed:
            parser.error(f"--sft {args.sft} holds a policy with {config}, this run needs {needed}")


# ------------------------------------------------------------------------------------------------
# LIBERO. A seed of envs/libero.py is a task and a start: an official one or a random placement.


def make_world(args, suite=None, demo_noise=None, test=False, film=None):
    """The simulators. With demo_noise they also observe the expert's action. test: with the test's
    time limit; film: a folder."""
    return libero.make_workers(
        suite or args.suite, args.tasks, min(args.num_envs, args.video) if film else args.num_envs,
        obs=args.obs, state_dim=args.state_dim, horizon=args.horizon,
        action_repeat=args.action_repeat, demo_noise=demo_noise, image_size=args.image_size,
        max_steps=args.test_max_steps if test else args.max_steps, gl=args.gl, film=film)


def make_policy(args):
    if args.policy:
        parts = pi0.memory(pi0.load(args.policy, "PI0Config"), args.train,
                           max(args.minibatch, args.sft_batch))
        print("expected memory: {frozen:.1f} GB of frozen weights, {trained:.1f} of trained ones, "
              "{kept:.1f} of a batch's keys and values; a pass comes on top".format(**parts),
              flush=True)
        return pi0.PI0Policy(args.policy, args.horizon, libero.ACTION_DIM, args.state_dim,
                             args.train, args.micro_batch)
    return RobotPolicy(args.horizon, libero.ACTION_DIM, args.state_dim,
                       cameras=2 * (args.obs == "rgb"), language=len(args.tasks) > 1)


def collect_demos(args):
    """--demos scripted, or a PATH to LIBERO's files -> [(rows, actions (T, 7)), ...]."""
    if args.demos != "scripted":
        return libero.recorded_demos(args.suite, args.tasks, args.demos, args.num_demos,
                                     args.skip_no_ops, args.obs, args.image_size)
    starts = flow.episode_seeds("demo", 10 * args.num_demos, args.seed)
    return scripted_demos(make_world(args, demo_noise=args.demo_noise),
                          [libero.random_start(task, starts) for task in args.tasks],
                          args.num_demos)


def random_starts(args, split, count, *run, group_size=1):
    """Seeds of `count` episodes, the tasks taking turns; group_size neighbours share one start."""
    starts = flow.episode_seeds(split, count // group_size, *run)
    first = run[1] * len(starts) if run else 0  # an iteration begins where the last one ended
    tasks = np.resize(np.roll(args.tasks, -first), len(starts))
    return np.repeat(libero.random_start(tasks, starts), group_size)


def test_all(policies, args):
    """Official and random starts in the suite of the training, official ones in --eval-suites, then
    films of the last policy; test.csv has a row for each task -> {policy: success}, official."""
    official = [libero.TASK * task + i for i in range(args.test_states) for task in args.tasks]
    random, rates = random_starts(args, "test", args.test_episodes), {}
    if not args.eval_only:  # its rows are added, under the path of the policy
        (args.out / "test.csv").unlink(missing_ok=True)
    for suite in dict.fromkeys([args.suite, *args.eval_suites]):
        world = make_world(args, suite, test=True)
        kinds = {"official initial states": official}
        if suite == args.suite:
            kinds["random placements"] = random
        for starts, seeds in kinds.items():
            for name, policy in policies.items():
                success = evaluate(policy, world, seeds, args.num_steps)
                rate = report(f"test, {name}, {suite}, {starts}", success)
                rates.setdefault(name, rate)  # the first: official starts, suite of the training
                for task in args.tasks:
                    own = success[np.asarray(seeds) // libero.TASK == task]
                    if len(own):
                        nft.log_row(args.out / "test.csv", {
                            "policy": name, "suite": suite, "task": task, "starts": starts,
                            **rated(own)})
        world.close()  # two sets of simulators may be more than the memory
    if args.video and not rank_of()[0]:
        filmed = make_world(args, test=True, film=args.out / "videos")
        flow.evaluate(policy, filmed, random[:args.video], args.num_steps)
        filmed.close()
        print(f"saved {len(random[:args.video])} episodes in {args.out}/videos")
    return rates


def task(text):
    return text if text == "all" else flow.natural(text)


def parse_args(argv=None):
    """All flags, checked; fills in what depends on the suite."""
    parser = flow.Parser(__doc__)
    add, suites = parser.add_argument, ", ".join(libero.TIME_LIMITS)
    add("--suite", default="libero_object", help=f"LIBERO suite: {suites}")
    add("--tasks", type=task, nargs="+", default=[0], help="task numbers in the suite, or all")
    add("--obs", default="state", choices=["state", "rgb"],
        help="poses of the objects, or two cameras (needs EGL or OSMesa); and the hand's pose")
    add("--image-size", type=flow.number(int, 48, 1024), default=128, help="height and width of "
        "the images; with --demos PATH that of the files, 128")
    add("--demos", default="scripted", metavar="PATH",
        help="scripted, or a folder (or file) of LIBERO's official HDF5 demonstrations")
    add("--action-repeat", type=flow.positive_int, default=4, metavar="R",
        help="control steps (1/20 s) for which each action of a chunk is held")
    add("--policy", metavar="PI0", help="a pi0 of Hugging Face's transformers, folder or name on "
        "the hub, in place of the small network from scratch; with --obs rgb")
    add("--train", default="expert", choices=["expert", "all"],
        help="what of pi0 learns; the rest is frozen, in bfloat16")
    add("--micro-batch", type=flow.positive_int, default=32, help="rows in pi0 at a time: lower it "
        "until it fits the GPU; the result is the same")
    add("--skip-no-ops", action="store_true", help="leave out recorded steps that do nothing")
    add("--eval-suites", nargs="*", default=[], metavar="SUITE", help="further suites for the "
        "final test; _swap _object _lan _task are LIBERO-PRO's variants of --suite")
    add("--test-states", type=flow.number(int, 1, libero.OFFICIAL), default=libero.OFFICIAL,
        help="official initial states of each task in the final test")
    add("--test-max-steps", type=flow.positive_int,
        help="time limit of the final test, in control steps (default: the suite's usual one)")
    add_run_flags(parser, envs_per_core=4, num_demos=3, demo_noise=0.5, sft_steps=2000,
                  iterations=10, horizon=1, lr=3e-5, eval_every=5, eval_episodes=100,
                  test_episodes=100, out="runs/04_train_libero", group_size=8, noise_level=0.5,
                  dpo_beta=0.1, ema=[0.1, 0.5])
    args = parse_run(parser, argv)

    every = range(len(libero.read_suite(args.suite).problems))
    args.tasks = list(every) if "all" in args.tasks else sorted(set(args.tasks))
    if not set(args.tasks) <= set(every):
        parser.error(f"--tasks {args.tasks}: {args.suite} has 0 to {every[-1]}, or all")
    scripted, able = args.demos == "scripted", libero.able_tasks(args.suite)
    demos_wanted = not (args.resume or args.eval_only or args.sft)
    if scripted and demos_wanted and not set(args.tasks) <= set(able):
        parser.error(f"--tasks {args.tasks}: --suite {args.suite} has no scripted expert but for "
                     f"the tasks {able}; give --demos PATH")
    if not scripted and demos_wanted and not Path(args.demos).exists():
        parser.error(f"--demos {args.demos}: no such file or folder")
    args.test_max_steps = args.test_max_steps or libero.time_limit(args.suite)
    # training on scripted demos, 60 to 150 steps on average, stops sooner: failures cost most time
    sooner = max(160, args.test_max_steps // 2)
    args.max_steps = args.max_steps or (sooner if scripted else args.test_max_steps)
    args.state_dim = libero.state_size(args.suite, args.obs)
    args.eval_suites = [args.suite + s if s.startswith("_") else s for s in args.eval_suites]
    for suite in args.eval_suites:
        if (len(libero.read_suite(suite, "--eval-suites").problems) <= max(args.tasks)
                or libero.state_size(suite, args.obs) > args.state_dim):
            parser.error(f"--eval-suites {suite} has fewer tasks, or more things in one, than "
                         f"--suite {args.suite}")
    if not args.policy and args.train != parser.get_default("train"):
        parser.error("--train all: that is about pi0; give --policy")
    if args.policy and args.obs != "rgb":
        parser.error("--policy: a vision-language model sees, give --obs rgb")
    check_clone(parser, args, make_policy)
    args.gl = libero.find_gl() if args.obs == "rgb" or args.video else None
    parser.make_folder("--out", args.out)
    return args


def main(method=StepNFT):
    args, start = parse_args(), time.time()
    join_ranks(args)
    if args.obs == "state":
        torch.set_num_threads(1)  # a small net: the cores are for the simulators
    print(" ".join(f"{k}={v}" for k, v in args.flags.items()), flush=True)
    told = f"RESULT suite={args.suite} task={','.join(map(str, args.tasks))}"
    if args.eval_only:
        policies = {str(args.eval_only): load_policy(args.eval_only, args.device)}
        policies[str(args.eval_only)].micro_batch = args.micro_batch
        rates = test_all(policies, args)
        return print(f"{told} success={rates[str(args.eval_only)]:.3f} "
                     f"seconds={time.time() - start:.0f}")
    sft = clone(args, make_policy, collect_demos)
    world = make_world(args)

    def start_seeds(iteration):
        return random_starts(args, "train", args.episodes, args.seed, iteration,
                             group_size=args.group_size)

    def validate(policy, name):
        seeds = random_starts(args, "validation", args.eval_episodes)
        return report(f"validation, {name}", evaluate(policy, world, seeds, args.num_steps))

    policy, env_steps = train(args, sft, world, method(args), start_seeds, validate)
    policies = {"SFT": sft, method.name: policy} if args.iterations else {"SFT": sft}
    world.close()
    rates = list(test_all(policies, args).values())
    print(f"{told} sft={rates[0]:.3f} stepnft={rates[-1]:.3f} "
          f"episodes={args.iterations * args.episodes} env_steps={env_steps} "
          f"seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    main()
