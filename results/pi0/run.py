"""Does the same 03 lift a vision-language-action model? A tiny random pi0 on PixelGap.

The architecture is pi0's (PI0ForConditionalGeneration of transformers, policies/pi0.py), every part
small: 0.26 million parameters, pictures of 16 x 16 pixels, no sentence. As nothing in it is
pretrained, all of it learns (--train all of 04). SFT on 48 demonstrations, then pi-StepNFT as in 05
on all K steps of a chunk; tested on 1,000 starts that are in no training.

--memory needs no weights: gigabytes of the full model by its config, for one GPU. --scaling: how
the time of a rollout and of an update grows from this tiny one to one of 40 times its size.

Run:     python results/pi0/run.py                 (3 seeds, 8 minutes each on one core)
         python results/pi0/run.py --memory
         python results/pi0/run.py --scaling       (a minute; only on a quiet machine)
Saves:   results/pi0/{curve.csv, summary.csv, memory.csv, scaling.csv}; a row of curve.csv is an
         evaluation
"""

import contextlib
import copy
import importlib
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
flow, nft, critics, common = map(importlib.import_module, (
    "01_flow_policy", "03_step_loss", "05_train_maniskill", "results.common"))
from envs import pixel_gap  # noqa: E402  (the lines above tell where)
from envs.gap_world import episode_seeds  # noqa: E402
from envs.workers import scripted_demos  # noqa: E402
from policies import pi0  # noqa: E402
from tools import flags  # noqa: E402
from tools.log import log_row  # noqa: E402
from tools.run import random_stream, sft  # noqa: E402

WORDS = 300  # in the tiny model's vocabulary: each byte, three special ones, some to spare


def tiny_config(pixels=16, patch=8, actions=8, layers=2, width=64):
    """-> transformers' PI0Config of a pi0 in which every part is small."""
    from transformers import PI0Config
    small = {"num_hidden_layers": layers, "num_attention_heads": 2, "hidden_size": width,
             "intermediate_size": 2 * width}
    expert = {"model_type": "gemma", **small, "num_key_value_heads": 1, "head_dim": 16}
    eyes = {"model_type": "siglip_vision_model", **small, "image_size": pixels,
            "patch_size": patch, "vision_use_head": False}
    return PI0Config(
        vlm_config={"model_type": "paligemma", "text_config": {**expert, "vocab_size": WORDS},
                    "vision_config": eyes, "projection_dim": width, "image_token_id": WORDS - 1},
        dit_config=expert, max_state_dim=actions, max_action_dim=actions)


def save_tokenizer(folder):
    """Writes one of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate(["<pad>", "<bos>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>",
                            pad_token="<pad>").save_pretrained(folder)


def make_tiny(folder, seed=0, **sizes):
    """Writes a pi0 with random weights and a tokenizer of bytes, as save_pretrained would."""
    from transformers import PI0ForConditionalGeneration
    torch.manual_seed(seed)
    PI0ForConditionalGeneration(tiny_config(**sizes)).save_pretrained(folder)
    save_tokenizer(folder)


def clone(args, folder):
    """05's `clone` with this policy: flow matching on the expert's first successes."""
    demos = scripted_demos(critics.make_world(args, args.demo_noise),
                           [episode_seeds("demo", 10 * args.num_demos, args.seed)], args.num_demos)
    chunks = torch.cat([flow.sliding_chunks(actions, args.horizon) for _, actions in demos])
    return sft(args, lambda: pi0.PI0Policy(folder, args.horizon, 2, 2, "all", micro_batch=2048),
               demos, chunks)


def train(args, cloned, world, measure):
    """The loop of 05's `main`, with a measurement in place of its log: measure(iteration, policy)
    for the clone, every --eval-every iterations and at the end."""
    policy, old = copy.deepcopy(cloned), copy.deepcopy(cloned)  # policy learns, old acts
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    measure(0, cloned)
    for i in range(args.iterations):
        random_stream(args.seed, i)
        starts = episode_seeds("train", args.episodes // args.group_size, args.seed, i)
        success, batch = world.play(nft.explore(old, args.num_steps, args.noise_level),
                                    np.repeat(starts, args.group_size))
        batch["y"] = nft.labels(success, batch["episode"], args.group_size)
        optimizer.param_groups[0]["lr"] = args.lr * (1 - i / args.iterations)  # smaller steps late
        critics.update(policy, optimizer, batch, args)
        nft.ema_update(old, policy, nft.ema_decay(i, args.iterations, *args.ema))
        if (i + 1) % args.eval_every == 0 or i + 1 == args.iterations:
            measure(i + 1, policy)


def run(job):
    """SFT and RL of one seed -> a row for each evaluation on 1,000 test starts."""
    start, rows, world = time.time(), [], pixel_gap.PixelGap()
    seeds = episode_seeds("test", job["test_episodes"])

    def measure(iteration, policy):
        success = flow.evaluate(policy, world, seeds, args.num_steps).mean()
        rows.append({"iteration": iteration, "success": success})

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        make_tiny(f"{out}/pi0", job["seed"])
        args = critics.parse_args(
            f"--task PixelGap --seed {job['seed']} --lr {job['lr']} --noise-level "
            f"{job['noise_level']} --transitions all --iterations {job['iterations']} "
            f"--episodes {job['episodes']} --sft-steps {job['sft_steps']} --eval-every 10 "
            f"--device cpu --out {out}/run".split())
        train(args, clone(args, f"{out}/pi0"), world, measure)
    told = {"seconds": round(time.time() - start), **common.origin("results/pi0/run.py")}
    return [{**row, **told} for row in rows]


def memory_rows():
    """The full model's expected gigabytes for both --train, minibatches of 256 rows."""
    from transformers import PI0Config
    for train in ("expert", "all"):
        parts = pi0.memory(PI0Config(), train, rows=256)
        yield {"train": train, **parts, "total": sum(parts.values())}


def scaling_rows(rows=64, steps=4):
    """Seconds on one core for 64 chunks of two cameras and a sentence: sampled with K = 4 (encode
    once, four velocities), and learned from (one optimisation step on one denoising step)."""
    obs = {"state": torch.randn(rows, 6), "tokens": torch.full((rows, 40), 97, dtype=torch.uint8),
           "rgb": torch.randint(256, (rows, 2, 3, 56, 56), dtype=torch.uint8)}
    for layers, width in ((2, 64), (4, 128), (8, 256)):
        with tempfile.TemporaryDirectory() as folder:
            make_tiny(folder, pixels=56, patch=14, layers=layers, width=width)
            policy = pi0.PI0Policy(folder, 4, 7, 6, micro_batch=16)
        optimizer = torch.optim.Adam(p for p in policy.parameters() if p.requires_grad)
        row = {"layers": layers, "width": width,
               "parameters": sum(p.numel() for p in policy.parameters())}
        for again in range(2):  # the first time warms up
            start = time.time()
            x_0 = flow.ode_sample(policy, obs, steps)
            row["rollout_seconds"] = time.time() - start
            start = time.time()
            loss = flow.flow_matching_loss(policy, obs, x_0)  # a velocity and its gradient
            nft.optimise(policy, optimizer, loss, grad_clip=1.0)
            row["update_seconds"] = time.time() - start
        yield row


def parse_args():
    parser = flags.Parser(__doc__)
    add, positive_int = parser.add_argument, flags.positive_int
    add("--seeds", type=positive_int, default=3, help="seeds 0, 1, ...")
    add("--first-seed", type=flags.natural, default=0)
    add("--lr", type=flags.positive_float, default=1e-4, help="of RL, falling to 0")
    add("--noise-level", type=flags.positive_float, default=0.3, help="of exploration")
    add("--iterations", type=positive_int, default=60, help="RL iterations")
    add("--episodes", type=positive_int, default=512, help="episodes per iteration, 8 a start")
    add("--sft-steps", type=positive_int, default=1500, help="optimisation steps of flow matching")
    add("--test-episodes", type=positive_int, default=1000, help="of each evaluation")
    add("--memory", action="store_true", help="no training: the memory of the full model")
    add("--scaling", action="store_true", help="no training: seconds, for three sizes")
    add("--jobs", type=positive_int, default=1, help="seeds at a time, one core each")
    add("--out", type=Path, default="results/pi0", help="folder of the tables")
    args = parser.parse_args()
    parser.make_folder("--out", args.out)
    return args


def main():
    args, start = parse_args(), time.time()
    torch.set_num_threads(1)
    for name, rows_of in (("memory", memory_rows), ("scaling", scaling_rows)):
        if getattr(args, name):
            (args.out / f"{name}.csv").unlink(missing_ok=True)
            for row in rows_of():
                log_row(args.out / f"{name}.csv", row)
                print(*(f"{key}={common.text(value)}" for key, value in row.items()))
            return print(f"RESULT saved={args.out}/{name}.csv")
    jobs = [{name: getattr(args, name) for name in (
        "lr", "noise_level", "iterations", "episodes", "sft_steps", "test_episodes")} | {"seed": s}
        for s in range(args.first_seed, args.first_seed + args.seeds)]
    common.collect(jobs, run, args.out / "curve.csv", args.jobs, desc="seeds")
    (args.out / "summary.csv").unlink(missing_ok=True)
    for job in jobs:
        first, *_, last = common.rows_of([job], args.out / "curve.csv")
        row = {"seed": job["seed"], "sft": first["success"], "after": last["success"],
               "test_episodes": job["test_episodes"], "seconds": last["seconds"]}
        log_row(args.out / "summary.csv", row)
        print("seed {seed}: SFT {sft}, after RL {after}".format(**row))
    print(f"RESULT seeds={len(jobs)} saved={args.out}/curve.csv seconds={time.time() - start:.0f}")


if __name__ == "__main__":
    main()
