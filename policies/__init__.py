"""Policies by name: what a checkpoint's config says is built again, and its weights are loaded.

    from policies import load_policy
    policy = load_policy("runs/04_train_libero/last.pt")
"""

import torch

from policies.pi0 import PI0Policy
from policies.small import RobotPolicy, SlotPolicy, SmallImagePolicy

SMALL = {policy.kind: policy for policy in (RobotPolicy, SlotPolicy, SmallImagePolicy)}


def build_policy(config, micro_batch=32):
    """The policy that a config, as checkpoints keep it, describes; pi0's names a folder."""
    options = {name: value for name, value in config.items() if name != "kind"}
    if config["kind"] == PI0Policy.kind:
        return PI0Policy(**options, micro_batch=micro_batch)
    return SMALL[config["kind"]](**options)


def load_policy(path, device="cpu", micro_batch=32):
    """-> the policy of any checkpoint of 04 or 05; pi0's needs the folder it was made from, too."""
    content = torch.load(path, map_location=device, weights_only=True)
    policy = build_policy(content["config"], micro_batch).to(device)
    # of weights from elsewhere: DDP and torch.compile prefix every name, nothing here uses them
    weights = {name.removeprefix("module.").removeprefix("_orig_mod."): value
               for name, value in content["policy"].items()}
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        told = " ".join(str(error).split())[:150]
        raise SystemExit(f"{path}: these weights are not those of its config ({told})") from None
    return policy


def credited(policy, v_theta, v_old):
    """v_theta in the action dims whose range in the demos, from the 1 % to the 99 % quantile, is
    over a tenth of [-1, 1]; v_old in the others: they hardly move, so their noise changes nothing,
    and v_old carries no gradient. Half of that range is FlowPolicy's action_scale; PI0Policy's is a
    standard deviation, so it brings half_range."""
    scale = getattr(policy, "action_scale", torch.ones(1, device=v_old.device))
    return torch.where(getattr(policy, "half_range", scale) > 0.1, v_theta, v_old)
