"""policies/critic.py: a network of its own on the policy's encoding, which it leaves alone."""

import torch

import conftest  # noqa: F401  (the way to the scripts)
from policies.critic import Critic


def test_a_value_is_a_network_of_what_the_policy_sees_and_of_the_time():
    """Against its own weights by hand, tanh between the layers; one number a row."""
    critic, ctx, elapsed = Critic(5, width=7), torch.randn(3, 5), torch.rand(3)
    (W1, b1), (W2, b2), (W3, b3) = [(layer.weight, layer.bias) for layer in critic.net[::2]]
    assert W1.shape == (7, 6) and W3.shape == (1, 7)
    x = torch.cat([ctx, elapsed[:, None]], 1)
    wanted = torch.tanh(torch.tanh(x @ W1.T + b1) @ W2.T + b2) @ W3.T + b3
    value = critic(ctx, elapsed)
    assert value.shape == (3,)
    torch.testing.assert_close(value, wanted[:, 0])


def test_the_same_sight_is_worth_something_else_later():
    critic, ctx = Critic(5), torch.randn(1, 5).expand(2, 5)
    early, late = critic(ctx, torch.tensor([0.0, 1.0])).tolist()
    assert early != late


def test_it_learns_and_does_not_train_the_encoder():
    critic, ctx = Critic(5), torch.randn(3, 5, requires_grad=True)
    critic(ctx, torch.rand(3)).sum().backward()
    assert ctx.grad is None
    assert all(p.grad.abs().max() > 0 for p in critic.parameters())


def test_its_learning_rate_is_its_own():
    assert Critic.lr == 1e-3
