"""What comes out of the README's exercises 1 to 10 and 15, seed 0: the changes made and run.

Each runs in a copy of the repo, with a few characters of a function exchanged or a flag given. The
four others (a world, a task, a policy, a grasp of one's own) are projects without a reference
solution.

Run:     python results/exercises.py            (8 minutes on one core)
         python results/exercises.py 6 9        (some of them)
Saves:   results/exercises/answers.csv
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

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
flow = importlib.import_module("01_flow_policy")
TABLE = ROOT / "results/exercises/answers.csv"
Try = namedtuple("Try", "exercise what command file code instead", defaults=(None,) * 3)
HALF = "03_step_loss.py --episodes 256"
TRIES = [
    Try(1, "K = 1", "01_flow_policy.py --num-steps 1"),
    Try(1, "K = 2", "01_flow_policy.py --num-steps 2"),
    Try(1, "K = 16", "01_flow_policy.py --num-steps 16"),
    Try(2, "2 demos", "01_flow_policy.py --num-demos 2"),
    Try(2, "20 demos", "01_flow_policy.py --num-demos 20"),
    Try(3, "16 steps, noise 0.5", "02_sde_sampler.py --num-steps 16"),
    Try(4, "old policy never follows", "03_step_loss.py --ema 1 1"),
    Try(4, "old policy follows at once", "03_step_loss.py --ema 0 0"),
    Try(5, "no limit on delta", "03_step_loss.py --max-drift 1000"),
    Try(6, "v_old in the place of v_neg", "03_step_loss.py", "03_step_loss.py",
        "for v in (v_pos, v_neg))", "for v in (v_pos, v_old))"),
    Try(7, "no correction", "03_step_loss.py", "02_sde_sampler.py",
        "sigma**2 * dt / (2 * t_cur) if corrected else 0", "0"),
    Try(8, "last step without noise", "03_step_loss.py", "02_sde_sampler.py",
        "return noise_level * torch.sqrt(", "return (t_next > 0) * noise_level * torch.sqrt("),
    Try(9, "errors averaged", "03_step_loss.py", "03_step_loss.py",
        "((x_next - mean).pow(2) / (std**2 + var_eps)).sum(-1)",
        "((x_next - mean).pow(2) / (std**2 + var_eps)).mean(-1)"),
    Try(9, "--dpo-beta 0.5", "03_step_loss.py --dpo-beta 0.5"),
    Try(10, "successes weigh 2", "03_step_loss.py", "03_step_loss.py",
        "torch.as_tensor(success).float() * 2 - 1", "torch.as_tensor(success).float() * 3 - 1"),
    Try(15, "each batch twice, 256 episodes", HALF, "03_step_loss.py",
        "info = update(policy, optimizer, batch,",
        "for part in [batch] + vars(args).pop('last', []):\n            args.last = [batch]\n"
        "            info = update(policy, optimizer, part,"),
]


def run(command, folder):
    """A script in a copy -> its RESULT as a dict of floats, and the last row of its log."""
    done = subprocess.run([sys.executable, *shlex.split(command), "--out", "runs/exercise"],
                          cwd=folder, check=True, text=True, capture_output=True)
    told = {name: float(value) for name, value in re.findall(r"(\w+)=([\d.]+)",
                                                             done.stdout.split("RESULT")[1])}
    for table in Path(folder, "runs/exercise").glob("*.csv"):
        told["rows"] = read(table)
    return told


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def answer(attempt):
    """Makes the change and runs it -> (success, remark)."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(f"git ls-files -z | xargs -0 cp --parents -t '{folder}'", shell=True,
                       cwd=ROOT, check=True)
        if attempt.file:
            path = Path(folder, attempt.file)
            text = path.read_text()
            assert text.count(attempt.code) == 1, f"{attempt.code} is not once in {attempt.file}"
            path.write_text(text.replace(attempt.code, attempt.instead))
        told, remark = run(attempt.command, folder), ""
        if attempt.exercise == 7:
            tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                                    "tests/test_02_sde_sampler.py"], cwd=folder, text=True,
                                   capture_output=True).stdout.splitlines()[-1]
            failed, passed = (int(re.search(rf"(\d+) {word}", tests)[1])
                              for word in ("failed", "passed"))
            remark = f"{failed} of {failed + passed} tests of 02 fail"
    if "wide" in told:
        return told["wide"], f"narrow starts {told['narrow']:.3f}"
    if attempt.command.startswith("02"):
        widest = max(told["rows"], key=lambda row: float(row["noise_level"]))
        return float(widest["success"]), f"spread {float(widest['spread']):.3f}"
    rate, drift = (float(told["rows"][-1][name]) for name in ("train_sde", "drift"))
    return told["stepnft"], remark or f"train_sde {rate:.2f}, drift {drift:.2f} at the end"


@functools.cache
def unchanged(command):
    """What an answer is compared with: a command of the repo as it is -> success."""
    return answer(Try(0, "", command))[0]


def main():
    parser, numbers = flow.Parser(__doc__), sorted({attempt.exercise for attempt in TRIES})
    parser.add_argument("exercises", type=int, nargs="*", help=f"of {numbers}; none: all of them")
    chosen = set(parser.parse_args().exercises or numbers)
    if not chosen <= set(numbers):
        parser.error(f"exercises {sorted(chosen - set(numbers))}: those here are {numbers}")
    found, commit = [], subprocess.getoutput(f"git -C '{ROOT}' describe --always --dirty")
    for attempt in tqdm([attempt for attempt in TRIES if attempt.exercise in chosen]):
        success, remark = answer(attempt)
        plain = HALF if attempt.command == HALF else attempt.command.split()[0]
        found.append({"exercise": attempt.exercise, "what": attempt.what, "success": success,
                      "beside": unchanged(plain), "remark": remark, "code": commit})
    kept = [row for row in read(TABLE) if int(row["exercise"]) not in chosen]
    rows = sorted([*kept, *found], key=lambda row: int(row["exercise"]))
    with open(TABLE, "w", newline="") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"RESULT answers={len(found)} saved={TABLE}")


if __name__ == "__main__":
    main()
