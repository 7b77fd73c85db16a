"""What several test files share: the way to the scripts, policies known in closed form, a planner
for the toy world, and runners for the scripts."""

import contextlib
import fcntl
import importlib
import io
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

from envs import gap_world  # noqa: E402  (the line above tells where)


def pytest_configure(config):
    config.addinivalue_line("markers", "sim: starts a simulator, a notebook's kernel or a browser "
                            "(`-m 'not sim'`: the inner loop)")
    # with pytest-xdist: files in their order; few tests in a file does not mean that they are short
    config.option.loadscopereorder = False


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random streams, whatever ran before it."""
    seed_all()


def seed_all():
    """Not by torch.manual_seed, which notes the whole stack, as deep as pytest's, for each kind of
    device that is not there."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    np.random.seed(0)


class MixtureFlow:
    """The exact velocity field of data whose entries are independent draws of a Gaussian mixture.

    Not a FlowPolicy: it offers what the two samplers need, and nothing is learned. Given
    its component, x_t is N((1 - t) m, (1 - t)^2 s^2 + t^2) and (x_0, x_1) is jointly Gaussian with
    it, so v = E[x_1 - x_0 | x_t] is a posterior-weighted sum of linear functions of x_t.
    """

    def __init__(self, weights, means, stds, horizon=1, action_dim=1):
        self.weights, self.means, self.stds = (                      # (components, 1, 1, 1)
            torch.tensor(z).double()[:, None, None, None] for z in (weights, means, stds))
        self.horizon, self.action_dim = horizon, action_dim

    def components(self, t):
        """Means and variances of x_t, one per component."""
        return (1 - t) * self.means, (1 - t)**2 * self.stds**2 + t**2

    def encode(self, obs):
        return torch.zeros(len(obs["state"]), 0)

    def velocity(self, x_t, t, ctx):
        t, x = t.double()[:, None, None], x_t.double()
        mean, var = self.components(t)
        normal = torch.distributions.Normal(mean, var.sqrt(), validate_args=False)
        posterior = (self.weights.log() + normal.log_prob(x)).softmax(0)
        x0_hat = self.means + (1 - t) * self.stds**2 / var * (x - mean)
        x1_hat = t / var * (x - mean)
        return (posterior * (x1_hat - x0_hat)).sum(0).to(x_t.dtype)

    def cdf(self, t):
        """The distribution function of one entry of x_t, as scipy.stats.kstest wants it."""
        mean, var = self.components(t)
        normal = torch.distributions.Normal(mean, var.sqrt())
        return lambda x: (self.weights * normal.cdf(torch.from_numpy(x)[:, None, None])
                          ).sum(0).flatten().numpy()


class Scripted(nn.Module):
    """A policy that is not a FlowPolicy: its velocity points exactly at the chunk of a script.

    It offers encode, velocity, denormalise, horizon, action_dim and a parameter that says on which
    device it is, nothing else: what a foreign policy must bring to be driven by 01 to 03. Its
    context is an object, which nobody else can take rows of.
    """

    def __init__(self, script, horizon, action_dim=2):
        super().__init__()
        self.script, self.horizon, self.action_dim = script, horizon, action_dim
        self.somewhere = nn.Parameter(torch.zeros(1))

    def encode(self, obs):
        plan = torch.as_tensor(self.script(obs["state"].numpy())).float()               # (B, H, A)
        return Opaque(plan)

    def velocity(self, x_t, t, ctx):
        # all paths end in the chunk x_0, so x_t = (1 - t) x_0 + t x_1 gives v = (x_t - x_0) / t
        return (x_t - ctx.content) / t[:, None, None]

    def denormalise(self, x_0):
        return x_0


class Opaque:
    """A context that can be handed on and nothing else: no rows, no length, no device."""

    def __init__(self, content):
        self.content = content


def expert_plan(state, horizon):
    """The scripted expert's next H actions if nothing is in the way: (N, 3) -> (N, H, 2)."""
    state, plan = state.copy(), []
    for _ in range(horizon):
        plan.append(gap_world.expert_action(state))
        state[:, :2] += gap_world.GapWorld.speed * plan[-1]
    return np.stack(plan, 1)


def run_process(name, *flags, cwd, ok=True):
    """Runs a script in a process of its own, on one core; checks its exit status."""
    done = subprocess.run([sys.executable, str(ROOT / name), *map(str, flags)], cwd=cwd, text=True,
                          capture_output=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"})
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def run_script(name, *flags, cwd, ok=True):
    """The same in this process, which has imported already what the script is going to."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [str(ROOT / name), *map(str, flags)])
        patch.setattr(sys, "path", [str((ROOT / name).parent), *sys.path])
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as stopped:
            status = stopped.code or 0
            if isinstance(status, str):
                print(status, file=err)
                status = 1
    assert (status == 0) == ok, out.getvalue() + err.getvalue()
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def result_line(done):
    """The last line of a run, `RESULT name=value ...`, as a dict; numbers as floats."""
    word, *pairs = done.stdout.strip().splitlines()[-1].split()
    assert word == "RESULT"
    return {name: float(value) if value.replace(".", "").isdigit() else value
            for name, value in (pair.split("=") for pair in pairs)}


def one_clear_line(done):
    """What a failed run told its user: exactly one line, no traceback."""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def run_main(script, *flags):
    """A script's main() in this process -> (exit status or message, stdout, stderr)."""
    out, err, code = io.StringIO(), io.StringIO(), None
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code
    return code, out.getvalue(), err.getvalue()


def wrong_call(script, *flags):
    """Flags that cannot work, in this process -> the one line with which the script answers.

    It runs in a folder that holds one file, `a_file`; afterwards the folder must hold nothing else,
    and nothing may have been printed but that line.
    """
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.chdir(folder)
        Path("a_file").write_text("not a folder, not a checkpoint")
        code, out, err = run_main(script, *flags)
        left = [str(path) for path in Path().rglob("*")]
    assert code not in (0, None), "the call went through"
    assert left == ["a_file"] and out == "", (left, out)
    line, = (code if isinstance(code, str) else err).strip().splitlines()
    return line


def made_once(factory, name, make):
    """A folder that `make` fills, once for all worker processes of pytest-xdist."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = factory.mktemp(name)
        make(folder)
        return folder
    folder = factory.getbasetemp().parent / name               # which the workers share
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            make(folder)
    return folder


@pytest.fixture(scope="session")
def sft_folder(tmp_path_factory):
    """A folder that holds a barely trained policy where 02 and 03 look for it."""
    def make(folder):
        flow = importlib.import_module("01_flow_policy")
        train = flow.train_sft
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flow, "train_sft", lambda policy, obs, chunks, steps: train(
                policy, obs, chunks, 100))
            patch.chdir(folder)
            flow.toy_policy(seed=0)

    return made_once(tmp_path_factory, "sft", make)


@pytest.fixture(scope="session")
def loaded_by_imports(tmp_path_factory):
    """The packages that a fresh process has loaded once it has imported every script and world."""
    code = ("import importlib, sys\n"
            "for name in ('envs.libero_demos', 'envs.maniskill', 'envs.my_world', 'envs.pixel_gap',"
            "             '04_train_libero', '05_train_maniskill'): importlib.import_module(name)\n"
            "print(*{name.split('.')[0] for name in sys.modules})")
    folder = made_once(tmp_path_factory, "imports", lambda folder: (folder / "names").write_text(
        subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)))
    return set((folder / "names").read_text().split())


@pytest.fixture
def workplace(sft_folder, tmp_path):
    """A fresh copy of that folder to run a script in."""
    shutil.copytree(sft_folder, tmp_path, dirs_exist_ok=True)
    return tmp_path
