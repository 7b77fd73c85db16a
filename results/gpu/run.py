"""What cannot be known without a GPU, measured on one in about ten minutes.

    libero      an iteration of 04 --obs rgb: control steps a second, what GPU and cores do in it
    maniskill   05 --sim gpu in 512 scenes: episodes a second, one seed in three scenes, the expert
    pi0         a full pi0 with random weights: memory beside the arithmetic of results/pi0, seconds
                of an update; with --epochs 3 its frozen part runs three times
    parity      one update of 03 on the GPU and on the CPU: how far the weights are apart

A part that fails is told, and the others go on; --only it shows the whole error.

Run:     python results/gpu/run.py
         python results/gpu/run.py --tiny          (a minute on a CPU: only to see that it runs)
Prints:  each number as it comes, then RESULT.
Saves:   results/gpu/{libero, maniskill, pi0, parity}.csv; with --tiny runs/gpu/
"""

import contextlib
import copy
import gc
import importlib
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
flow, nft, robot, critics, common, benchmark, tiny_pi0 = map(importlib.import_module, (
    "01_flow_policy", "03_step_loss", "04_train_libero", "05_train_maniskill", "results.common",
    "results.benchmark.run", "results.pi0.run"))
from envs import maniskill, maniskill_gpu  # noqa: E402  (the lines above tell where)
from envs.gap_world import GapWorld, episode_seeds  # noqa: E402
from policies import build_policy, pi0  # noqa: E402
from tools import flags, ranks  # noqa: E402
from tools.log import log_row  # noqa: E402

FULL = SimpleNamespace(
    device="cuda", libero="--tasks all --episodes 256", maniskill="--sim gpu --episodes 512",
    scenes=512, rows=512, minibatch=256, micro_batch=32, episodes=512)
TINY = SimpleNamespace(
    device="cpu", libero="--episodes 2 --group-size 1 --num-envs 1 --max-steps 8 --image-size 48 "
    "--minibatch 4", maniskill="--sim cpu --episodes 8",
    scenes=1, rows=4, minibatch=2, micro_batch=2, episodes=32)


# ------------------------------------------------------------------------------------------------
# What a stretch of work does to the machine


def gpu_now():
    """-> (share of the last moment in which the GPU computed, GB in use on it), by nvidia-smi; None
    where it tells nothing. Simulators that draw are in it, too."""
    ask = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used",
           "--format=csv,noheader,nounits",
           f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"]
    try:
        busy, used = subprocess.check_output(ask, text=True, stderr=subprocess.DEVNULL).split(",")
        return float(busy) / 100, float(used) * 2**20 / 1e9
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def cpu_seconds():
    """What this process and those of its simulators have computed so far."""
    here = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [here, *here.children(recursive=True)])


class Watch:
    """`with Watch() as watch: work` -> watch.seconds, and watch.rows() of all that it saw."""

    def __enter__(self):
        self.seen, self.done, self.on_gpu = [], threading.Event(), torch.cuda.is_available()
        self.thread = threading.Thread(target=self.look, daemon=True)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.thread.start()
        self.cpu, self.start = cpu_seconds(), time.perf_counter()
        return self

    def look(self):
        while not self.done.wait(0.5):
            self.seen += filter(None, [gpu_now()])

    def __exit__(self, *_):
        if self.on_gpu:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start
        self.cores = (cpu_seconds() - self.cpu) / self.seconds / common.cores()
        self.done.set()
        if self.on_gpu:
            self.thread.join()

    def rows(self, work):
        yield f"{work}, seconds", self.seconds
        yield f"{work}, share of the cores that is busy", self.cores
        if self.on_gpu:
            yield f"{work}, GB of tensors at the peak", torch.cuda.max_memory_allocated() / 1e9
        if self.seen:
            busy, used = zip(*self.seen)
            yield f"{work}, share of the time in which the GPU computes", np.mean(busy)
            yield f"{work}, GB in use on the GPU, simulators included", max(used)


# ------------------------------------------------------------------------------------------------
# The four parts: each yields (what, number)


def libero(size):
    """04 --obs rgb: a rollout and its update, as `main` has them."""
    with tempfile.TemporaryDirectory() as out:
        args = robot.parse_args([*size.libero.split(), "--obs", "rgb", "--device", size.device,
                                 "--out", out])
        torch.manual_seed(0)
        policy = robot.make_policy(args).to(args.device)
        act = nft.explore(policy, args.num_steps, args.noise_level)
        yield "simulators", args.num_envs
        with contextlib.closing(ranks.shared(robot.make_world(args), args.device)) as world:
            with Watch() as watch:
                world.play(act, robot.random_starts(args, "validation", args.num_envs))
            yield "every simulator built, and its first episode, seconds", watch.seconds
            seeds = robot.random_starts(args, "train", args.episodes, group_size=args.group_size)
            with Watch() as watch:
                success, batch = world.play(act, seeds)
            steps = int(batch["mask"].sum()) * args.action_repeat
            yield "rollout, control steps a second", steps / watch.seconds
            yield from watch.rows("rollout")
            infos = [psutil.Process(process.pid).memory_full_info()
                     for process in world.envs.processes]
            sizes = [getattr(info, "pss", info.rss) / 1e9 for info in infos]  # shared pages once
            yield "GB of main memory of a simulator", np.mean(sizes)
        batch["y"] = nft.labels(success, batch["episode"], args.group_size)
        optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
        with Watch() as watch:
            robot.update(policy, optimizer, batch, args)
        yield from watch.rows("update")


def follow_expert(task):
    """An `act`: the scripted controller, by what the observation of a state tells."""
    def act(obs):
        actions = [maniskill.expert(maniskill.TASKS[task].skill, row[4] > 0, row[5:8], row[8:11])
                   for row in obs["state"].cpu().numpy()]
        return torch.from_numpy(np.stack(actions))[:, None], {}
    return act


def scenes(size):
    """05 --sim gpu: rollouts, resets, one seed in three scenes, the expert."""
    with tempfile.TemporaryDirectory() as out:
        args = critics.parse_args([*size.maniskill.split(), "--device", size.device, "--out", out])
    torch.manual_seed(0)
    policy = build_policy(critics.policy_config(args)).to(args.device)
    act = nft.explore(policy, args.num_steps, args.noise_level)
    count, starts = size.scenes, episode_seeds("train", 2 * size.scenes)
    with Watch() as watch:
        world = maniskill_gpu.make_scenes(args.task, count, args.max_steps, args.device)
        world = ranks.shared(world, args.device)
    yield "scenes", count
    yield "all scenes built, seconds", watch.seconds
    with contextlib.closing(world):
        world.play(act, starts[:count])                          # the first steps take longer
        with Watch() as watch:
            _, rows = world.play(act, starts)
        yield "episodes a second", len(starts) / watch.seconds
        yield "control steps a second", int(rows["mask"].sum()) / watch.seconds
        yield from watch.rows("rollout")
        with Watch() as watch:
            world.envs.reset(seed=starts[:count].tolist(), options={
                "reset_mask": np.ones(count, bool)})
        yield "all scenes reset, seconds", watch.seconds
        seeds = episode_seeds("test", max(3, count))
        same = [0, len(seeds) // 2, len(seeds) - 1]
        seeds[same] = seeds[0]
        success, rows = world.play(follow_expert(args.task), seeds)
    parts = [rows["state"][rows["episode"] == episode] for episode in same]
    both = min(map(len, parts))
    apart = torch.stack([(part[:both] - parts[0][:both]).abs().amax(1) for part in parts]).amax(0)
    yield "one seed in three scenes, apart at the start", apart[0].item()
    yield "one seed in three scenes, apart at most", apart.max().item()
    yield "one seed in three scenes, different outcomes", len(set(success[same])) - 1
    yield "the expert's success", success.mean()


@contextlib.contextmanager
def random_weights(config, device):
    """A pi0 that is asked for is made of its config alone, on the device; nothing is read."""
    from transformers import PI0ForConditionalGeneration

    def made(*_, **__):
        with torch.device(device):
            return PI0ForConditionalGeneration(config), {"missing_keys": [], "mismatched_keys": []}

    with mock.patch.object(PI0ForConditionalGeneration, "from_pretrained", made):
        yield


def pi0_update(size):
    """The policy, acting policy and clone of 04 --policy, and its update on images of noise."""
    from transformers import PI0Config
    torch.manual_seed(0)
    config = PI0Config() if size is FULL else tiny_pi0.tiny_config()
    with tempfile.TemporaryDirectory() as folder, random_weights(config, size.device):
        config.save_pretrained(folder)
        tiny_pi0.save_tokenizer(folder)
        policy = build_policy(dict(kind="pi0", folder=folder, horizon=4, action_dim=7, state_dim=6,
                                   train="expert"), size.micro_batch)
    n = size.rows
    obs = {"rgb": torch.randint(256, (n, 2, 3, 128, 128), dtype=torch.uint8),
           "tokens": torch.full((n, 40), 97, dtype=torch.uint8), "state": torch.randn(n, 6)}
    policy.fit_normalisation(obs, torch.rand(n, 4, 7) * 2 - 1)
    policy = policy.to(size.device)
    old, clone = copy.deepcopy(policy), copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-5)
    yield "parameters, billions", sum(p.numel() for p in policy.parameters()) / 1e9
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the weights held while they were of 32 bits
    with Watch() as watch:
        record = nft.explore(old, 4, 0.5)(ranks.to_device(obs, size.device))[1]
    yield f"{n} chunks sampled, seconds", watch.seconds
    with Watch() as watch, torch.no_grad():
        for rows in torch.arange(n).split(size.minibatch):
            policy.encode(ranks.to_device(flow.take(obs, rows), size.device))
    yield f"images and sentences of {n} chunks alone, seconds", watch.seconds
    batch = {**obs, **ranks.to_device(record, "cpu"), "mask": torch.ones(n, 4, dtype=torch.bool),
             "y": torch.ones(n)}
    for epochs in (1, 3):
        args = benchmark.update_args(epochs=epochs, minibatch=size.minibatch, device=size.device)
        with Watch() as watch:
            robot.update(policy, optimizer, batch, args)
        yield from watch.rows(f"update, --epochs {epochs}")
    computed = pi0.memory(config, "expert", size.minibatch)
    yield "GB as results/pi0 computes them", sum(computed.values())
    del clone  # held until here, as 04 holds it


def parity(size):
    """One optimisation step of 03 on the same rows, on the CPU and on the device."""
    torch.manual_seed(0)
    policy = flow.FlowPolicy(horizon=4, action_dim=2, state_dim=3)
    success, batch = GapWorld().play(nft.explore(policy, 4, 0.5),
                                     episode_seeds("train", size.episodes))
    batch["y"] = nft.labels(success, batch["episode"])
    batch["k"] = torch.randint(4, (len(batch["x"]),))

    def updated(device):
        twin = copy.deepcopy(policy).to(device)
        torch.manual_seed(0)
        nft.update(twin, torch.optim.Adam(twin.parameters(), lr=3e-4),
                   ranks.to_device(batch, device), epochs=1, minibatch=len(batch["y"]))
        return torch.cat([p.detach().cpu().flatten() for p in twin.parameters()])

    products = torch.backends.cuda.matmul
    before, wanted = products.allow_tf32, updated("cpu")
    for fast, name in ((False, "exact products"), (True, "products on tensor cores")):
        products.allow_tf32 = fast
        apart = (updated(size.device) - wanted).abs().max().item()
        yield f"weights of the CPU and of the device apart, {name}", apart
    products.allow_tf32 = before


# ------------------------------------------------------------------------------------------------

PARTS = {"libero": libero, "maniskill": scenes, "pi0": pi0_update, "parity": parity}


def measure(name, size, path, told):
    """Runs a part: prints each of its numbers as it comes, and adds a row to its csv."""
    path.unlink(missing_ok=True)
    for what, value in PARTS[name](size):
        log_row(path, {"what": what, "value": float(value), **told})
        print(f"{name}: {what} = {float(value):.5g}", flush=True)


def parse_args():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    add("--tiny", action="store_true", help="all of it small, on the CPU; it says nothing")
    add("--out", type=Path, default="results/gpu", help="folder of the tables")
    args = parser.parse_args()
    if args.tiny and args.out == Path(parser.get_default("out")):
        args.out = Path("runs/gpu")
    if not (args.tiny or torch.cuda.is_available()):
        parser.error("there is no GPU here: --tiny shows on the CPU that it runs")
    parser.make_folder("--out", args.out)
    return args


def main():
    args, start, failed = parse_args(), time.time(), []
    size = TINY if args.tiny else FULL
    name = "no GPU" if args.tiny else torch.cuda.get_device_name()
    told = {**common.origin("results/gpu/run.py"),
            "hardware": f"{name}, {common.cores()} CPU cores"}
    ranks.join_ranks(SimpleNamespace(device=size.device))  # as a run of 04 or 05 begins
    for part in args.only:
        try:
            measure(part, size, args.out / f"{part}.csv", told)
        except (Exception, SystemExit) as error:
            if args.only == [part]:
                raise
            failed.append(part)
            line = str(error).strip().split("\n")[0]
            print(f"{part} failed, {type(error).__name__}: {line}", file=sys.stderr, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    print(f"RESULT parts={len(args.only) - len(failed)} failed={','.join(failed) or 'none'} "
          f"saved={args.out} seconds={time.time() - start:.0f}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
