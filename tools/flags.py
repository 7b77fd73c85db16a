"""Flags: a parser whose errors are one line, types that check a number, and the flags of a run.

A script builds `Parser(__doc__)` and adds its own flags. 03, 04 and 05 share the flags of the
method, 04 and 05 those of a run. `parse_run` reads them for a new run; with --resume and
--eval-only they come from the checkpoint, need not be repeated; only those in FREE may change.
"""

import argparse
import math
import os
import sys
from pathlib import Path

import torch

from tools import files, memory


def call(main):
    """main() of a script; Ctrl-C ends it in one line."""
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; a run that has saved last.pt goes on with --resume", file=sys.stderr)
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, and errors of one line that name the flag."""

    def __init__(self, doc):
        super().__init__(description=doc.split("\n\n")[0], allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")

    def peek(self, flag, argv=None):
        """The value of one flag before all are parsed, or None: defaults may depend on it."""
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument(flag, dest="value")
        return first.parse_known_args(argv)[0].value

    def refuse(self, args, names, told):
        """An error if one of these flags was given, that is, differs from its default."""
        for name in names:
            if getattr(args, name) != self.get_default(name):
                self.error(f"--{name.replace('_', '-')} {told}")

    def make_folder(self, flag, path):
        """Last of all checks, so that a wrong call leaves nothing behind."""
        try:
            files.make_folder(path)
        except SystemExit as error:
            self.error(f"{flag} {error}")

    def claim_folder(self, flag, path):
        """The same for a folder whose files belong to one run."""
        self.make_folder(flag, path)
        if not files.lock(path):
            self.error(f"{flag} {path}: another run is writing there; give a folder of its own")
        if hasattr(self, "num_envs"):
            tell_memory(self.num_envs, self.gb_per_env)


def number(kind, low, high=math.inf):
    """A flag's type: a finite int or float from low to high."""
    def check(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:  # nan compares as false
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    check.__name__ = kind.__name__  # argparse says "invalid int value"
    return check


positive_int, natural, positive_float = number(int, 1), number(int, 0), number(float, 1e-9)


def look_into(path):
    """What a checkpoint holds; its file is mapped, so that weights nobody looks at are not read."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def checkpoint(text):
    """A flag's type: a file that `save` of tools/run.py wrote."""
    try:
        content = look_into(text)
        content["config"]["kind"], content["policy"], content["flags"]
    except FileNotFoundError:
        raise argparse.ArgumentTypeError(f"{text}: no such file; train first") from None
    except Exception:  # torch raises many kinds for a file that is something else
        raise argparse.ArgumentTypeError(f"{text} is not a checkpoint of 04 or 05: give the sft.pt "
                                         "or last.pt of a run") from None
    return Path(text)


# ------------------------------------------------------------------------------------------------
# The flags of the method, in 03, 04 and 05


def add_method_flags(parser):
    """The method's main numbers, at the defaults of 03, with the paper's values."""
    add, positive = parser.add_argument, positive_float
    add("--target", default="next", choices=["next", "endpoint"],
        help="what the branches must explain: the next step (the method), or the endpoint x_0")
    add("--group-size", type=positive_int, default=1,
        help="episodes per start; above 1, labels are centred on their mean")
    add("--noise-level", type=positive, default=0.5, help="a, width of the exploration; paper: 0.2")
    add("--num-steps", type=positive_int, default=4, help="K, denoising steps")
    add("--beta", type=positive, default=1.0, help="distance of the branches, in units of delta")
    add("--max-drift", type=positive, default=0.5, help="longest delta, per action, in flow units")
    add("--dpo-beta", type=positive, default=1.0, help="slope of the ranking, as in DPO")
    add("--ema", type=number(float, 0, 1), nargs=2, metavar=("START", "END"),
        default=[0.1, 0.1], help="how much of the acting policy stays, in the first and in the "
        "last iteration; paper: 0.1 0.995, over a horizon far longer than its runs")


def check_method(parser, args):
    if args.episodes % args.group_size:
        parser.error(f"--episodes {args.episodes} is no multiple of --group-size {args.group_size}")
    if args.ema[0] > args.ema[1]:
        parser.error(f"--ema {args.ema[0]} {args.ema[1]}: END is below START, but old slows down")


# ------------------------------------------------------------------------------------------------
# The flags of a run, in 04 and 05


def add_run_flags(parser, envs_per_core, gb_per_env=0.7, **defaults):
    """Demos, training, evaluation and logs of a run. As many simulators as cores and memory bear;
    each takes about gb_per_env."""
    add, parser.gb_per_env = parser.add_argument, gb_per_env
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # torchrun's ranks on one machine share it
    bearable = min(envs_per_core * cores, memory.free() / gb_per_env) / local_ranks()
    add("--num-demos", type=positive_int, default=20, help="demonstrations per task for SFT")
    add("--demo-noise", type=number(float, 0), default=0.1, help="noise on demo actions: in "
        "04 pushes of the hand in one direction, for 5 to 10 steps; in 05 fresh in every step")
    add("--sft-steps", type=positive_int, default=1000, help="optimisation steps of flow matching")
    add("--sft-lr", type=positive_float, default=1e-3, help="AdamW's, falling to 0")
    add("--sft-batch", type=positive_int, default=256, help="rows of each of these steps, on "
        "each rank")
    add("--sft", type=checkpoint, metavar="FILE", help="start from another run's sft.pt")
    add("--iterations", type=natural, default=20, help="RL iterations; 0: SFT only. --resume "
        "may change it: --lr and --ema then run over the new number")
    add("--episodes", type=positive_int, default=256, help="episodes per iteration, all tasks")
    add("--max-steps", type=positive_int, help="time limit of an episode, in control "
        "steps; without it 05 takes the task's, 04 half of the suite's test limit, 160 or more, "
        "and with recorded demos all of it")
    add("--horizon", type=positive_int, default=4, help="H, actions per chunk")
    add("--transitions", default="all", choices=["all", "one"],
        help="train on all K denoising steps of a chunk, or on one at random (the paper)")
    add("--lr", type=positive_float, default=3e-4, help="Adam's, falling linearly to 0")
    add("--epochs", type=positive_int, default=3, help="passes over each batch")
    add("--minibatch", type=positive_int, default=512, help="chunks per step, on each rank")
    add("--eval-every", type=positive_int, default=5, help="iterations between validations")
    add("--eval-episodes", type=positive_int, default=200, help="episodes per validation")
    add("--test-episodes", type=positive_int, default=200, help="episodes of the final test")
    add("--num-envs", type=positive_int, default=max(1, int(bearable)),
        help="simulators at a time, for each rank of torchrun")
    devices = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    add("--device", choices=devices, default=devices[0], help="of the policy")
    add("--seed", type=natural, default=0, help="seed of demos, SFT, rollouts and updates")
    add("--out", type=Path, default="runs", help="folder of logs and checkpoints")
    add("--video", type=natural, default=0, metavar="N", help="film N test episodes as mp4")
    add("--resume", action="store_true", help="continue the run in --out, with its flags")
    add("--eval-only", type=checkpoint, metavar="FILE", help="test this policy and stop")
    parser.set_defaults(**defaults)


def local_ranks():
    """How many of torchrun's ranks share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def tell_memory(num_envs, gb_per_env):
    """Says it on stderr, before something is killed, if so many simulators need more memory."""
    need, left = num_envs * gb_per_env, memory.free() / local_ranks()
    if need > left:
        print(f"--num-envs {num_envs}: {need:.1f} GB of memory for that many simulators, and "
              f"{left:.1f} are free; if one dies, give {max(1, int(left / gb_per_env))}",
              file=sys.stderr)


# Flags that are not taken from a checkpoint: they belong to the call or to the machine
OF_THE_CALL = {"script", "out", "resume", "eval_only", "device", "video", "sft"}
# Flags that are, and that a later call may change
FREE = {"iterations", "eval_every", "eval_episodes", "test_episodes", "test_states",
        "test_max_steps", "eval_suites", "eval_ood", "ood_episodes", "num_envs", "micro_batch",
        "sim"}


def parse_run(parser, argv=None):
    """Flags, checked: a new run's; or with --resume and --eval-only those of the checkpoint.

    Adds args.flags, what checkpoints keep; args.resume becomes the path of last.pt or False.
    """
    args, stored = parser.parse_args(argv), {}
    path = args.eval_only or (args.resume and args.out / "last.pt")
    if path:
        stored = stored_flags(parser, args, path)
        parser.set_defaults(**stored, out=path.parent)
        args = parser.parse_args(argv)
    for name in stored.keys() - FREE - ({"tasks", "meshes"} if args.eval_only else set()):
        if getattr(args, name) != stored[name]:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: {path} was trained "
                         f"with {stored[name]}; leave the flag out")
    check_method(parser, args)
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
    parser.num_envs = args.num_envs  # told once nothing else is wrong: `claim_folder`
    args.resume = args.resume and path
    args.flags = {"script": parser.prog, **{name: str(value) if isinstance(value, Path) else value
                                            for name, value in vars(args).items()}}
    return args


def stored_flags(parser, args, path):
    """The flags that the checkpoint at `path` brings, for --resume or --eval-only."""
    missing = [name for name in ("last.pt", "sft.pt", "log.csv")
               if args.resume and not (args.out / name).exists()]
    if missing:
        parser.error(f"--resume: {args.out} has no {', '.join(missing)}; leave --resume out")
    try:
        flags = look_into(checkpoint(path))["flags"]
    except argparse.ArgumentTypeError as error:
        parser.error(f"--resume: {error}")
    if flags["script"] != parser.prog:
        parser.error(f"{path} was trained by {flags['script']}")
    # a resumed run repeats what it would have done only with as many simulators
    leave = OF_THE_CALL | ({"num_envs"} if args.eval_only else set())
    return {name: flags[name] for name in flags.keys() - leave}


def check_clone(parser, args, needed):
    """--sft must hold a policy of the kind that this run would train; needed: its config."""
    if args.sft:
        config = look_into(args.sft)["config"]
        if config != needed:
            parser.error(f"--sft {args.sft} holds a policy with {config}, this run needs {needed}")
