"""One run on several GPUs: `torchrun --nproc-per-node=N` starts a script N times, as N ranks.

Each rank plays its share of the episodes and learns from its own rows. Gradients are averaged as
backward makes them, so every rank takes the same steps and holds the same policy:

    join_ranks(args)                     once, before anything is made
    average_gradients(policy)            once, before it learns
    world = shared(world, device)        its `play` looks as if one rank had played everything
    for rows in minibatches(count, n)    a step is taken by all ranks or by none

Without torchrun there is one rank, to which all of this changes nothing.
"""

import datetime
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


def join_ranks(args):
    """Under torchrun meets the other ranks and sets args.device. Rank 0 alone writes, and prints on
    stdout: the others get a folder that is thrown away."""
    if args.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True  # float32 products on tensor cores
    if "RANK" not in os.environ:
        return
    cuda, local = args.device == "cuda", int(os.environ["LOCAL_RANK"])
    if cuda and local >= torch.cuda.device_count():
        raise SystemExit(f"torchrun: rank {local} of this machine has no GPU of its own, there are "
                         f"{torch.cuda.device_count()}: give --nproc-per-node as many, or --device "
                         "cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                            timeout=datetime.timedelta(hours=2))
    if cuda:
        torch.cuda.set_device(local)
        args.device = f"cuda:{local}"
        show_gpu(local)
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


def to_device(tensors, device):
    """A dict of tensors -> the same on a device."""
    return {name: values.to(device) for name, values in tensors.items()}


class OnDevice:
    """A world for a policy on `device`: act sees tensors there, rows come back to the CPU."""

    def __init__(self, world, device):
        self.world, self.device = world, device

    def __getattr__(self, name):  # change, close, ...
        return getattr(self.world, name)

    def play(self, act, seeds):
        def act_there(obs):
            actions, record = act(to_device(obs, self.device))
            return actions.cpu(), to_device(record, "cpu")

        return self.world.play(act_there, seeds)


class Shared(OnDevice):
    """Such a world, which all ranks play together."""

    def play(self, act, seeds):
        """Each rank plays its share -> (success of all the episodes, the rows of this rank, whose
        `episode` counts among all)."""
        own = share(np.arange(len(seeds)))
        success, rows = super().play(act, np.asarray(seeds)[own])
        if len(own):
            rows["episode"] = rows["episode"] + own[0]
        return gather(success), rows


def shared(world, device):
    """-> the world, played by all ranks with a policy on `device`."""
    return Shared(world, device) if rank_of()[1] > 1 else OnDevice(world, device)


def average_gradients(module):
    """From now on every backward leaves the mean of all ranks' gradients."""
    def average(parameter):
        dist.all_reduce(parameter.grad)
        parameter.grad /= rank_of()[1]

    for parameter in module.parameters() if dist.is_initialized() else []:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average)


def minibatches(count, size):
    """A random order of `count` rows in parts of `size`: one epoch. Each rank takes as many rows,
    at random, as the one with fewest: as many steps on each."""
    fewest = int(gather(torch.tensor([count])).min())
    return torch.randperm(count)[:fewest].split(size)


# ------------------------------------------------------------------------------------------------
# Which GPU the simulators of a rank draw on


def show_gpu(local):
    """The simulators of this rank, started later, see its GPU only and, if EGL's number of it can
    be found, draw there. CUDA's number is another: EGL counts other devices too, in its own order;
    and it may be a name, of a GPU (GPU-...) or of a part of one (MIG-...)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(local + 1)))
    name = visible.split(",")[local].strip()
    os.environ["CUDA_VISIBLE_DEVICES"] = name
    devices = egl_devices()
    if name.isdigit() and int(name) in devices and "MUJOCO_EGL_DEVICE_ID" not in os.environ:
        os.environ["MUJOCO_EGL_DEVICE_ID"] = str(devices.index(int(name)))


ASK_EGL = """
import ctypes
egl = ctypes.CDLL("libEGL.so.1")
egl.eglGetProcAddress.restype = ctypes.c_void_p
egl.eglGetProcAddress.argtypes = [ctypes.c_char_p]


def function(name, *types):
    return ctypes.CFUNCTYPE(ctypes.c_uint, *types)(egl.eglGetProcAddress(name))


query_devices = function(b"eglQueryDevicesEXT", ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
query = function(b"eglQueryDeviceAttribEXT", ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
devices, count = (ctypes.c_void_p * 10)(), ctypes.c_int()  # MuJoCo looks at ten, too
query_devices(10, devices, ctypes.byref(count))
for device in devices[:count.value]:
    number = ctypes.c_ssize_t(-1)
    known = query(device, 0x323A, ctypes.byref(number))  # EGL_CUDA_DEVICE_NV
    print(number.value if known else -1)
"""


def egl_devices():
    """CUDA's number of each of EGL's devices, -1 for one that it does not have; [] without EGL. In
    a process of its own, as a driver may crash, and one that sees all GPUs, as EGL_CUDA_DEVICE_NV
    counts those that are visible."""
    environ = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    told = subprocess.run([sys.executable, "-c", ASK_EGL], env=environ, capture_output=True)
    return [int(line) for line in told.stdout.split()] if told.returncode == 0 else []
