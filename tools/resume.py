"""A run that can stop and go on: its checkpoints, and the flags that they keep.

`save` writes a policy with the flags of its run. `last.pt`, written after every iteration, also has
all else that the next one needs: the acting policy, Adam's averages, how far the run is. As `train`
of 04 gives each iteration a random stream of its own, a run that is killed and resumed ends with
the numbers of one that never stopped.

    python 04_train_libero.py --resume --out runs/04_train_libero      no other flag is needed

`parse_run` reads the flags, here and with --eval-only, from the checkpoint.
"""

import argparse
import importlib
import os
from pathlib import Path

import torch

nft = importlib.import_module("03_step_loss")

# Flags that are not taken from a checkpoint: they belong to the call or to the machine
OF_THE_CALL = {"script", "out", "resume", "eval_only", "device", "video", "sft"}
# Flags that are, and that a later call may change
FREE = {"iterations", "eval_every", "eval_episodes", "test_episodes", "test_states",
        "test_max_steps", "eval_suites", "eval_ood", "ood_episodes", "num_envs", "micro_batch"}


def save(path, policy, args, **more):
    """A policy and the flags it was trained with: the whole file or none."""
    content = {"config": policy.config, "policy": policy.state_dict(), "flags": args.flags}
    torch.save({**content, **more}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


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


def look_into(path):
    """What a checkpoint holds; its file is mapped, so that weights nobody looks at are not read."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def checkpoint(text):
    """A flag's type: a file that `save` wrote."""
    try:
        content = look_into(text)
        content["config"], content["policy"], content["flags"]
    except FileNotFoundError:
        raise argparse.ArgumentTypeError(f"{text}: no such file; train first") from None
    except Exception:  # torch raises many kinds for a file that is something else
        raise argparse.ArgumentTypeError(f"{text} is not a checkpoint of 04 or 05: give the sft.pt "
                                         "or last.pt of a run") from None
    return Path(text)


def parse_run(parser, argv=None):
    """Flags, checked: a new run's; or with --resume and --eval-only those of the checkpoint, which
    need not be repeated and may not be contradicted."""
    args, stored = parser.parse_args(argv), {}
    path = args.eval_only or (args.resume and args.out / "last.pt")
    if path:
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


def check_clone(parser, args, needed):
    """--sft must hold a policy of the kind that this run would train; needed: its config, all of
    it. A checkpoint from before a new entry has none of that."""
    if args.sft:
        config = look_into(args.sft)["config"]
        if not config.items() <= needed.items():
            parser.error(f"--sft {args.sft} holds a policy with {config}, this run needs {needed}")
