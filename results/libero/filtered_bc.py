"""Filtered behaviour cloning on LIBERO: what one would try before any reinforcement learning.

04 with another `update`: the clone plays as it does there, and then, in place of ranking steps,
learns by flow matching from the chunks of its own successes. Failures teach nothing. Episodes,
exploration noise, passes and the old policy are as there, with the same flags; those of the ranking
(--target, --beta, --dpo-beta, --max-drift, --transitions) do nothing here.

It regresses every action dim, noise included, also those that hardly move in the demonstrations:
the method spares itself their noise (`credited` in policies/).

Run:     python results/libero/filtered_bc.py --tasks all --num-demos 1 --lr 1e-4 \\
             --out runs/filtered_bc
Prints, saves: what 04 does.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
flow, nft, robot = map(importlib.import_module, (
    "01_flow_policy", "03_step_loss", "04_train_libero"))
from tools import ranks  # noqa: E402  (the lines above tell where)


def update(policy, optimizer, batch, args):
    """Minibatch steps of flow matching on what was played in successful episodes -> mean info."""
    kept, infos = flow.take(batch, batch["won"]), []
    for _ in range(args.epochs):
        for rows in ranks.minibatches(len(kept["x"]), args.minibatch):
            if not len(rows):  # some rank saw no success: none of them takes this step
                continue
            part = ranks.to_device(flow.take(kept, rows), args.device)
            loss = flow.flow_matching_loss(policy, part, part["x"][:, -1])  # x_0, flow units
            norm = nft.optimise(policy, optimizer, loss, grad_clip=1.0)
            infos.append({"loss": loss.detach(), "grad_norm": norm})
    if not infos:
        return {"loss": 0.0, "grad_norm": 0.0}
    return nft.mean_info(infos)


def main():
    robot.main(update, "filtered BC", "filtered_bc", __doc__)


if __name__ == "__main__":
    main()
