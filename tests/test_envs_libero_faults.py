"""envs/libero_import.py and tools/ranks.py on machines as people have them: GPUs that EGL counts in
its own order, folders that cannot be written, another LIBERO's settings. What can be borne is
borne, the rest is told in one line."""

import contextlib
import json
import logging
import logging.handlers
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from conftest import ROOT
from envs import libero, libero_import
from test_envs_libero import gl  # noqa: F401 (a fixture)
from tools import ranks

sim = pytest.mark.sim
GPU = "MUJOCO_EGL_DEVICE_ID"
NAMES = ("GPU-8f6d3c1e-0000", "MIG-5c89852c-0000", "3,GPU-8f6d3c1e-0000")


def in_one_line(function, *args):
    with pytest.raises(SystemExit) as stopped:
        function(*args)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


# ------------------------------------------------------------------------------------------------
# Which GPU draws


@pytest.mark.parametrize("visible, local, egl, wanted", [
    (None, 0, [0], "0"), (None, 1, [0], None),                      # one EGL device, two GPUs
    (None, 1, [2, 0, 1, -1], "2"), ("2,3", 0, [3, -1, 2], "2"),     # EGL has its own order
    ("2, 3", 1, [3, -1, 2], "0"), ("4", 0, [0, 1], None), ("0", 0, [], None),
    (NAMES[0], 0, [0], None), (NAMES[2], 1, [0, 3], None), (NAMES[1], 0, [0], None)])
def test_a_rank_draws_on_its_own_gpu_or_where_egl_likes(visible, local, egl, wanted, monkeypatch):
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), (GPU, None)):
        monkeypatch.setenv(name, value or "")
        value or monkeypatch.delenv(name)
    monkeypatch.setattr(ranks, "egl_devices", lambda: egl)
    ranks.show_gpu(local)
    seen = (visible or "0,1").split(",")[local].strip()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen and os.environ.get(GPU) == wanted


def test_a_gpu_that_the_user_has_chosen_draws(monkeypatch):
    monkeypatch.setenv(GPU, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(ranks, "egl_devices", lambda: [0, 1])
    ranks.show_gpu(0)
    assert os.environ[GPU] == "1"


def test_egl_is_asked_in_a_process_that_sees_all_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    asked = []

    def run(command, env, **more):
        asked.append(env)
        return SimpleNamespace(returncode=0, stdout=b"1\n-1\n0\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert ranks.egl_devices() == [1, -1, 0] and "CUDA_VISIBLE_DEVICES" not in asked[0]
    monkeypatch.setattr(subprocess, "run", lambda *args, **more: SimpleNamespace(
        returncode=-11, stdout=b"1\n"))                             # a driver that crashes
    assert ranks.egl_devices() == []


def test_more_ranks_than_gpus_is_one_line(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    line = in_one_line(ranks.join_ranks, SimpleNamespace(device="cuda"))
    assert "--nproc-per-node" in line and "rank 2" in line and "2:" in line


@sim
def test_egl_here_has_no_gpu_of_cuda_or_tells_its_number(gl):  # noqa: F811
    if gl != "egl":
        pytest.skip("no EGL")
    devices = ranks.egl_devices()
    assert devices and all(-1 <= number < max(torch.cuda.device_count(), 1) for number in devices)


@pytest.mark.parametrize("device", ["99", "GPU-8f6d3c1e", ""])
def test_an_egl_device_that_is_not_there_is_named(device, monkeypatch):
    """Not "apt-get install", and no drawing in software without a word."""
    monkeypatch.setenv(GPU, device)

    def draw(gl, environ):
        return "RuntimeError: between 0 and 0, got 99." if GPU in environ and gl == "egl" else None

    monkeypatch.setattr(libero_import, "draw", draw)
    line = in_one_line(libero_import.find_gl)
    assert line.startswith(f"{GPU}={device}:") and "got 99" in line and "apt-get" not in line


def test_without_any_gl_the_packages_and_the_cause_are_named(monkeypatch):
    for device in (None, "0"):
        monkeypatch.setenv(GPU, device or "")
        device or monkeypatch.delenv(GPU)
        monkeypatch.setattr(libero_import, "draw", lambda gl, environ: f"ImportError: no {gl}")
        line = in_one_line(libero_import.find_gl)
        assert "apt-get install" in line and "ImportError: no egl" in line
    monkeypatch.setattr(libero_import, "draw", lambda gl, environ: "Error: x" * (gl == "egl"))
    assert libero_import.find_gl() == "osmesa"


@sim
def test_a_real_egl_device_that_is_not_there(gl, monkeypatch):  # noqa: F811
    if gl != "egl":
        pytest.skip("no EGL")
    monkeypatch.setenv(GPU, "99")
    assert in_one_line(libero_import.find_gl).startswith(f"{GPU}=99:")
    monkeypatch.setenv(GPU, "0")
    assert libero_import.find_gl() == "egl"


# ------------------------------------------------------------------------------------------------
# What is loaded with robosuite


def test_robosuite_is_imported_without_a_log_and_without_variables_of_gpus(monkeypatch):
    monkeypatch.setenv(GPU, "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", NAMES[0])
    with pytest.raises(ZeroDivisionError), libero_import.alone():
        assert not {GPU, "CUDA_VISIBLE_DEVICES"} & set(os.environ)
        log = logging.FileHandler("/nowhere/robosuite.log")
        log.setLevel(logging.DEBUG)
        log.emit(None)
        raise ZeroDivisionError
    assert os.environ[GPU] == "7" and os.environ["CUDA_VISIBLE_DEVICES"] == NAMES[0]
    assert logging.FileHandler.__name__ == "FileHandler"
    assert issubclass(logging.handlers.RotatingFileHandler, logging.FileHandler)


# Every file that is opened to be written while a simulator is loaded and steps.
WRITES = """
import json, os, sys
written = []


def watch(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
        written.append(str(args[0]))
    elif event == "os.mkdir":
        written.append(str(args[0]))


sys.addaudithook(watch)
sys.path.insert(0, sys.argv[1])
from envs import libero
simulator = libero.LiberoSim("libero_object", 0)
simulator.reset(0)
print(json.dumps([written, simulator.observe()["state"].tolist()]))
"""


LENT = ("LIBERO_CONFIG_PATH", "NUMBA_CACHE_DIR", "MPLCONFIGDIR")


@contextlib.contextmanager
def home(path, **more):
    """Another home folder; what is set in it does not last."""
    with mock.patch.dict(os.environ):
        for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", *LENT):
            os.environ.pop(name, None)
        os.environ.update(HOME=str(path), **more)
        yield


@sim
def test_a_simulator_shares_no_file_and_asks_for_no_gpu(tmp_path):
    with home(tmp_path, CUDA_VISIBLE_DEVICES=NAMES[2], **{GPU: "5"}):
        run = subprocess.run([sys.executable, "-c", WRITES, str(ROOT)], capture_output=True,
                             text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    written, _ = json.loads(run.stdout.splitlines()[-1])
    allowed = ("__pycache__", str(tmp_path), "/dev/null")
    assert not [path for path in written if not any(word in path for word in allowed)], written


# ------------------------------------------------------------------------------------------------
# Folders that cannot be used


def lent():
    """What `lend_folders` has set, {variable: folder}."""
    libero_import.lend_folders()
    return {name: os.environ[name] for name in LENT if name in os.environ}


def test_nothing_is_lent_where_all_can_be_used(tmp_path):
    with home(tmp_path):
        assert lent() == {}


def test_a_folder_is_lent_where_home_and_site_packages_cannot_be_written(tmp_path, monkeypatch):
    """A home that is a file cannot be written by anybody, root included."""
    (tmp_path / "file").write_text("no folder")
    package = SimpleNamespace(submodule_search_locations=[tmp_path / "file/robosuite"])
    with home(tmp_path / "file"):
        assert set(lent()) == {"MPLCONFIGDIR"}              # numba writes beside robosuite
    monkeypatch.setattr(libero_import.importlib.util, "find_spec", lambda name: package)
    with home(tmp_path / "file"):
        folders = lent()
        assert set(folders) == {"MPLCONFIGDIR", "NUMBA_CACHE_DIR"}
        folder, = set(folders.values())
        assert os.stat(folder).st_mode & 0o777 == 0o700     # nobody else's
        assert lent() == folders                            # and once is enough
    with home(tmp_path):
        assert lent() == {}                                 # numba writes into the home folder
    with home(tmp_path / "file", NUMBA_CACHE_DIR=str(tmp_path / "own"),
              MPLCONFIGDIR=str(tmp_path)):
        assert lent()["NUMBA_CACHE_DIR"] == str(tmp_path / "own")


def test_settings_in_a_home_that_is_another_users_are_not_looked_for(tmp_path, monkeypatch):
    def refuses(path):
        raise PermissionError(13, "Permission denied", str(path))

    with home(tmp_path):
        monkeypatch.setattr(Path, "is_file", refuses)
        assert set(lent()) == {"LIBERO_CONFIG_PATH"}


def test_a_user_without_a_name_has_a_home(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: os.environ.get("HOME", path))
    with home(tmp_path):
        del os.environ["HOME"]
        assert lent() == {} and os.listdir(os.environ["HOME"]) == []


def unprivileged():
    """A Python that runs as nobody, with these packages, or None: root alone may change to it."""
    if os.getuid() or not shutil.which("setpriv"):
        return None
    packages = os.pathsep.join([str(ROOT), *(path for path in sys.path if "site-packages" in path)])
    for python in (sys.executable, "/usr/bin/python3"):
        command = ["env", f"PYTHONPATH={packages}", "setpriv", "--reuid=65534", "--regid=65534",
                   "--clear-groups", python]
        done = subprocess.run([*command, "-c", "import mujoco, subprocess, sys; "
                               "subprocess.run([sys.executable, '-c', ''], check=True)"],
                              capture_output=True, cwd="/")
        if done.returncode == 0:
            return command
    return None


@sim
def test_a_user_who_may_write_nowhere_has_a_simulator():
    command = unprivileged()
    if command is None:
        pytest.skip("root alone can act as nobody")
    run = subprocess.run([*command, "-c", WRITES, str(ROOT)], capture_output=True, text=True,
                         cwd="/", env={**os.environ, "HOME": "/root"})
    assert run.returncode == 0 and not run.stderr, run.stderr[-2000:]
    written, state = json.loads(run.stdout.splitlines()[-1])
    assert len(state) == 18 and not [path for path in written if "robosuite.log" in path]


# ------------------------------------------------------------------------------------------------
# Another LIBERO's settings, and files that are missing


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """-> a function that writes config.yaml where LIBERO looks for it."""
    libero.read_suite("libero_object")  # LIBERO keeps the folder of its import
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "settings"))

    def write(text):
        (tmp_path / "settings").mkdir(exist_ok=True)
        (tmp_path / "settings/config.yaml").write_text(text)
        return str(tmp_path / "settings/config.yaml")

    return write


def suite(name="libero_object"):
    return libero.read_suite.__wrapped__(name)                      # not the one that is cached


def copied(tmp_path, name="libero_object"):
    """libero_object's files in a folder of their own, as LIBERO has them."""
    package = Path(libero.read_suite(name).files[0]).parents[2]
    for part in ("bddl_files", "init_files"):
        shutil.copytree(package / part / name, tmp_path / part / name)
    return f"bddl_files: {tmp_path}/bddl_files\ninit_states: {tmp_path}/init_files\n"


@pytest.mark.parametrize("part", ["bddl_files", "init_states", "assets"])
def test_settings_of_another_libero_are_named(part, settings, tmp_path):
    config = settings(f"{part}: {tmp_path}/elsewhere\n")
    line = in_one_line(suite)
    assert line.startswith("--suite libero_object: ") and f"{tmp_path}/elsewhere" in line
    assert config in line and "LIBERO_CONFIG_PATH" in line and "try libero_object" not in line


@pytest.mark.parametrize("text", ["bddl_files: [", "just a sentence", "- a\n- list\n"])
def test_settings_that_cannot_be_read_are_named(text, settings):
    config = settings(text)
    line = in_one_line(suite)
    assert line.startswith(config) and "LIBERO_CONFIG_PATH" in line


def test_settings_that_name_a_whole_libero_serve(settings, tmp_path):
    settings(copied(tmp_path))
    assert suite().files[0].startswith(f"{tmp_path}/bddl_files")


@pytest.mark.parametrize("part", ["bddl_files", "init_files"])
@pytest.mark.parametrize("broken", [False, True])
def test_a_file_that_one_task_lacks_is_named(part, broken, settings, tmp_path):
    settings(copied(tmp_path))
    file = sorted((tmp_path / part / "libero_object").iterdir())[3]
    file.unlink()
    if broken and part == "init_files":
        file.write_bytes(b"half of it")
    line = in_one_line(suite)
    assert f"{file.stem.split('.')[0]}" in line and "LIBERO_CONFIG_PATH" in line


def test_a_package_that_lacks_a_file_is_to_be_installed_again(tmp_path, monkeypatch):
    from libero import libero as package
    text, places = copied(tmp_path), package.get_default_path_dict()
    own = dict(line.split(": ") for line in text.splitlines())
    monkeypatch.setattr(package, "get_default_path_dict", lambda: {**places, **own})
    assert len(suite().files) == 10
    task = libero.read_suite("libero_object").tasks.get_task(4)
    Path(f"{tmp_path}/init_files/libero_object/{task.init_states_file}.npz").unlink()
    line = in_one_line(suite)
    assert "of task 4" in line and task.init_states_file in line and "install" in line


def test_suites_that_the_package_names_and_does_not_hold():
    for name in ("libero_goal_env", "libero_100", "libero_object_with_trigger"):
        line = in_one_line(suite, name)
        assert line.startswith(f"--suite {name} comes without") and "try libero_spatial" in line


@pytest.mark.sim
def test_numpys_generator_is_left_as_it_was():
    """Building, placing and playing draw from it; whoever else does must not notice."""
    np.random.seed(5)
    expected = np.random.random(4)
    np.random.seed(5)
    drawn = [np.random.random()]
    sim = libero.LiberoSim("libero_object", 0)
    drawn.append(np.random.random())
    for number in (0, 1000):
        sim.reset(number)
        sim.advance(libero.NO_OP)
        drawn.append(np.random.random())
    assert drawn == list(expected)
