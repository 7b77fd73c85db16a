"""The critic of 05's PPO: a second network, which predicts success from what the policy sees."""

import torch
from torch import nn


class Critic(nn.Module):
    """V(observation, time): an MLP on the policy's encoding, which it does not train."""

    lr = 1e-3  # it starts from nothing, the policy does not

    def __init__(self, context, width=256):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(context + 1, width), nn.Tanh(),
                                 nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, ctx, elapsed):
        """ctx (B, C), elapsed (B,): how much of the time limit is over -> (B,)."""
        return self.net(torch.cat([ctx.detach(), elapsed[:, None]], -1))[:, 0]
