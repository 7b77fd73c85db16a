"""What comes out of exercises 1 to 13 of course/README.md, seed 0: the changes made and run.

A change is a flag, or a few characters of a script exchanged in a copy of the repo. Beside it
stands the same script without that flag, or unchanged.

Run:     python course/exercises.py             (15 minutes on one core)
         python course/exercises.py 8 9         (some of them)
Saves:   course/answers.csv
"""

import csv
import functools
import importlib
import re
import shlex
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from envs.gap_world import GapWorld, episode_seeds  # noqa: E402  (the line above tells where)
from tools import flags  # noqa: E402

flow = importlib.import_module("01_flow_policy")

TABLE = ROOT / "course/answers.csv"
SAMPLER = "02_sde_sampler.py"
STEP = "03_step_loss.py"
HALF = "03_step_loss.py --episodes 256"
SIGNS = "torch.as_tensor(success).float() * 2 - 1"
Try = namedtuple("Try", "exercise what command file code instead", defaults=(None,) * 3)
TRIES = [
    Try(1, "K = 1", "01_flow_policy.py --num-steps 1"),
    Try(1, "K = 2", "01_flow_policy.py --num-steps 2"),
    Try(1, "K = 16", "01_flow_policy.py --num-steps 16"),
    Try(2, "2 demos", "01_flow_policy.py --num-demos 2"),
    Try(2, "20 demos", "01_flow_policy.py --num-demos 20"),
    Try(3, "x_1 = 0, the clone", "01_flow_policy.py"),
    Try(3, "x_1 = 0, a clone of 300 steps", "01_flow_policy.py --sft-steps 300"),
    Try(3, "x_1 = 0, a clone of 100 steps", "01_flow_policy.py --sft-steps 100"),
    Try(3, "x_1 = 0, after 03", STEP),
    Try(4, "16 steps, noise 0.5", "02_sde_sampler.py --num-steps 16"),
    Try(5, "no correction", STEP, SAMPLER,
        "sigma**2 * dt / (2 * t_cur) if corrected else 0", "0"),
    Try(6, "last step without noise", STEP, SAMPLER,
        "return noise_level * torch.sqrt(", "return (t_next > 0) * noise_level * torch.sqrt("),
    Try(6, "last step noisy, but never trained", STEP, STEP,
        "torch.randint(args.num_steps,", "torch.randint(args.num_steps - 1,"),
    Try(7, "no limit on delta", "03_step_loss.py --max-drift 1000"),
    Try(7, "a limit of 0.05", "03_step_loss.py --max-drift 0.05"),
    Try(8, "v_old in the place of v_neg", STEP, STEP,
        "for v in (v_pos, v_neg))", "for v in (v_pos, v_old))"),
    Try(8, "the same with lr 3e-3", "03_step_loss.py --lr 3e-3", STEP,
        "for v in (v_pos, v_neg))", "for v in (v_pos, v_old))"),
    Try(9, "errors averaged", STEP, STEP,
        "((x_next - mean).pow(2) / (std**2 + var_eps)).sum(-1)",
        "((x_next - mean).pow(2) / (std**2 + var_eps)).mean(-1)"),
    Try(9, "--dpo-beta 0.5", "03_step_loss.py --dpo-beta 0.5"),
    Try(10, "successes weigh 2", STEP, STEP, SIGNS, SIGNS.replace("2", "3")),
    Try(10, "successes alone", STEP, STEP, SIGNS, SIGNS.replace(" * 2 - 1", "")),
    Try(10, "failures alone", STEP, STEP, SIGNS, SIGNS.replace(" * 2", "")),
    Try(11, "old policy never follows", "03_step_loss.py --ema 1 1"),
    Try(11, "old policy follows at once", "03_step_loss.py --ema 0 0"),
    Try(11, "old policy slows down", "03_step_loss.py --ema 0.1 0.995"),
    Try(12, "16 passes over each batch", HALF, STEP, "epochs=4,", "epochs=16,"),
    Try(12, "4 passes over each of the last 4", HALF, STEP,
        "info = update(policy, optimizer, batch,",
        "args.last = (vars(args).get('last', []) + [batch])[-4:]\n        for part in args.last:\n"
        "            info = update(policy, optimizer, part,"),
    Try(13, "endpoint", "03_step_loss.py --target endpoint"),
    Try(13, "endpoint, old policy slow", "03_step_loss.py --target endpoint --ema 0.9 0.995"),
]


def run(command, folder):
    """A script in a copy -> its RESULT as a dict of floats, and the rows of its log."""
    done = subprocess.run([sys.executable, *shlex.split(command), "--out", "runs/exercise"],
                          cwd=folder, check=True, text=True, capture_output=True)
    result = done.stdout.split("RESULT")[1]
    told = {name: float(value) for name, value in re.findall(r"(\w+)=([\d.]+)", result)}
    for table in Path(folder, "runs/exercise").glob("*.csv"):
        told["rows"] = read(table)
    return told


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def copy_of_the_repo(folder):
    """What git tracks."""
    subprocess.run(f"git ls-files -z | xargs -0 cp --parents -t '{folder}'", shell=True,
                   cwd=ROOT, check=True)


def exchange(path, code, instead):
    """The mistake or change, in a file that must hold this code once."""
    text = path.read_text()
    assert text.count(code) == 1, f"{code} is not once in {path.name}"
    path.write_text(text.replace(code, instead))


def from_zero(command, folder):
    """Exercise 3: success without noise and with it, of the policy that a script saves, and how
    far apart the chunks are."""
    run(command, folder)
    file, = Path(folder, "runs/exercise").glob("*.pt")
    policy = flow.FlowPolicy(horizon=4, action_dim=2, state_dim=3)
    policy.load_state_dict(torch.load(file, weights_only=True))
    seeds = episode_seeds("test", 1000)

    def act(obs):
        zeros = torch.zeros(len(obs["state"]), policy.horizon, policy.action_dim)
        return policy.denormalise(flow.ode_sample(policy, obs, 4, x_1=zeros)), {}

    success = {}
    for name, width in (("narrow", 0.3), ("wide", 0.9)):
        success[name] = (GapWorld(width).play(act, seeds)[0].mean(),
                         flow.evaluate(policy, GapWorld(width), seeds).mean())
    torch.manual_seed(0)
    obs = GapWorld().reset(seeds[:200])                                            # (200, 3)
    many = {"state": obs["state"].repeat_interleave(100, 0)}
    chunks = flow.ode_sample(policy, many, 4).view(200, 100, 4, 2)                 # 100 draws each
    one = flow.ode_sample(policy, obs, 4, x_1=torch.zeros(200, 4, 2))
    spread = chunks.std(1).median()
    off = (one - chunks.mean(1)).abs().median()
    remark = "narrow starts {:.3f} beside {:.3f}".format(*success["narrow"])
    return *success["wide"], f"{remark}; spread {spread:.3f}, x_1 = 0 {off:.3f} from the mean"


def answer(attempt):
    """Makes the change and runs it -> (success, remark)."""
    with tempfile.TemporaryDirectory() as folder:
        copy_of_the_repo(folder)
        if attempt.exercise == 3:
            return from_zero(attempt.command, folder)
        if attempt.file:
            exchange(Path(folder, attempt.file), attempt.code, attempt.instead)
        told = run(attempt.command, folder)
        failed = failing_tests(folder) if attempt.exercise == 5 else ""
    rows = told.get("rows")
    if attempt.command.startswith("01"):
        return told["wide"], None, f"narrow starts {told['narrow']:.3f}"
    if attempt.command.startswith("02"):
        widest = max(rows, key=lambda row: float(row["noise_level"]))
        return float(widest["success"]), None, f"spread {float(widest['spread']):.3f}"
    rank, drift = float(rows[-1]["rank_accuracy"]), float(rows[-1]["drift"])
    return told["stepnft"], None, failed or f"rank_accuracy {rank:.2f}, drift {drift:.2f}"


def failing_tests(folder):
    """Of 02, in a copy with a change."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
               "tests/test_02_sde_sampler.py"]
    told = subprocess.run(command, cwd=folder, text=True, capture_output=True).stdout
    last = told.splitlines()[-1]
    failed, passed = (int(re.search(rf"(\d+) {word}", last)[1]) for word in ("failed", "passed"))
    return f"{failed} of {failed + passed} tests of 02 fail"


@functools.cache
def unchanged(command):
    """What an answer is compared with: a command of the repo as it is -> success."""
    return answer(Try(0, "", command))[0]


def main():
    parser = flags.Parser(__doc__)
    numbers = sorted({attempt.exercise for attempt in TRIES})
    parser.add_argument("exercises", type=int, nargs="*", help=f"of {numbers}; none: all of them")
    chosen = set(parser.parse_args().exercises or numbers)
    if not chosen <= set(numbers):
        parser.error(f"exercises {sorted(chosen - set(numbers))}: those here are {numbers}")
    torch.set_num_threads(1)
    commit = subprocess.getoutput(f"git -C '{ROOT}' describe --always --dirty")
    found = []
    for attempt in tqdm([attempt for attempt in TRIES if attempt.exercise in chosen]):
        success, beside, remark = answer(attempt)
        if beside is None:
            beside = unchanged(attempt.command if attempt.file else attempt.command.split()[0])
        found.append({"exercise": attempt.exercise, "what": attempt.what,
                      "success": round(success, 4), "beside": round(beside, 4), "remark": remark,
                      "code": commit})
    kept = [row for row in read(TABLE) if int(row["exercise"]) not in chosen]
    rows = sorted([*kept, *found], key=lambda row: int(row["exercise"]))
    with open(TABLE, "w", newline="") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"RESULT answers={len(found)} saved={TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
