"""Filtered behaviour cloning on LIBERO: what one would try before any reinforcement learning.

04 with one method exchanged: the clone plays as it does there, and then, in place of ranking steps,
learns by flow matching from the chunks of its own successes. Failures teach nothing. Episodes,
exploration noise, passes and the old policy are as there, with the same flags; those of the ranking
(--target, --beta, --dpo-beta, --max-drift, --transitions) do nothing here.

Run:     python results/filtered_bc.py --tasks all --num-demos 1 --lr 1e-4 --out runs/filtered_bc
Prints, saves: what 04 does.
"""

import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
flow, nft, robot = map(importlib.import_module, (
    "01_flow_policy", "03_step_loss", "04_train_libero"))


class FilteredBC(robot.StepNFT):
    """`StepNFT` of 04, with another `learn`."""
    name, key = "filtered BC", "filtered_bc"

    def learn(self, policy, optimizer, batch, success):
        """Minibatch steps of flow matching on what was played in successful episodes -> info."""
        kept = flow.take(batch, torch.as_tensor(success)[batch["episode"]])
        kept = robot.equal_rows(kept)
        count, infos = len(kept["x"]), []
        if not count:  # no success, nothing to clone
            return {"loss": 0.0, "grad_norm": 0.0}
        for _ in range(self.args.epochs):
            for rows in torch.randperm(count).split(self.args.minibatch):
                part = flow.to_device(flow.take(kept, rows), policy)
                loss = flow.flow_matching_loss(policy, part, part["x"][:, -1])  # x_0, flow units
                norm = nft.optimise(policy, optimizer, loss, grad_clip=1.0)
                infos.append({"loss": loss.detach(), "grad_norm": norm})
        return nft.mean_info(infos)


if __name__ == "__main__":
    robot.main(FilteredBC, __doc__)
