"""One run on several GPUs: `torchrun --nproc-per-node=N` starts a script N times, as N ranks.

Each rank plays its share of the episodes and learns from its own rows. Gradients are averaged as
backward makes them, so every rank takes the same steps and holds the same policy:

    join_ranks(args)                        once, before anything is made
    average_gradients(policy)               once, before it learns
    success = gather(play(share(seeds)))    each its part, then all of them again
    update(equal_rows(batch))               a step is taken by all ranks or by none

Without torchrun there is one rank, to which all of this changes nothing.
"""

import datetime
import importlib
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

flow = importlib.import_module("01_flow_policy")


def join_ranks(args):
    """Under torchrun meets the other ranks and sets args.device. Rank 0 alone writes, and prints on
    stdout: the others get a folder that is thrown away."""
    if "RANK" not in os.environ:
        return
    cuda, local = args.device == "cuda", int(os.environ["LOCAL_RANK"])
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                            timeout=datetime.timedelta(hours=2))
    if cuda:
        torch.cuda.set_device(local)
        args.device = f"cuda:{local}"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(local + 1)))
        # its simulators, started later, see this GPU only and draw there
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local]
        os.environ["MUJOCO_EGL_DEVICE_ID"] = visible.split(",")[local]
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


def average_gradients(module):
    """From now on every backward leaves the mean of all ranks' gradients."""
    def average(parameter):
        dist.all_reduce(parameter.grad)
        parameter.grad /= rank_of()[1]

    for parameter in module.parameters() if dist.is_initialized() else []:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average)


def equal_rows(batch):
    """Each rank keeps as many rows, at random, as the one with fewest: as many steps on each."""
    count = len(batch["mask"])
    fewest = int(gather(torch.tensor([count])).min())
    return flow.take(batch, torch.randperm(count)[:fewest]) if fewest < count else batch
