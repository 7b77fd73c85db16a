"""How 05's baselines explore: with noise in one denoising step (Flow-SDE, as in the paper), or with
noise on the finished chunk (`ppo-action`, in the spirit of StructRL, arXiv 2608.15139); and the
likelihood ratio of such a chunk. Each is an `act` for a world's `play`, as `explore` of 03."""

import importlib

import torch

from policies import credited

flow, sde = map(importlib.import_module, ("01_flow_policy", "02_sde_sampler"))


def one_noisy_step(policy, num_steps, noise_level):
    """An `act` for a world's `play`: `explore` of 03 with noise in one random step, k (B,)."""
    def act(obs):
        k = torch.randint(num_steps, (len(obs["state"]),), device=obs["state"].device)
        noise = noise_level * (torch.arange(num_steps, device=k.device) == k[:, None])  # (B, K)
        x_0, path = sde.sde_sample(policy, obs, num_steps, noise)
        return policy.denormalise(x_0), {"k": k, **path._asdict()}
    return act


def noisy_chunk(policy, num_steps, noise_level):
    """An `act` for a world's `play`: no noise on the way, but on the finished chunk, with standard
    deviation noise_level in flow units."""
    def act(obs):
        x = flow.ode_path(policy, obs, num_steps)                              # (B, K+1, H, A)
        chunk = x[:, -1] + noise_level * torch.randn_like(x[:, -1])
        return policy.denormalise(chunk), {"x": x, "chunk": chunk}
    return act


def chunk_log_ratio(policy, part, ctx, args):
    """log of the new over the old likelihood of each row's chunk, N(x_0, noise_level^2), over its
    executed actions: (B,). x_0 is where the policy's ODE leads from the recorded x_1 on, so a
    gradient goes through all its steps."""
    x_t, times = part["x"][:, 0], sde.time_grid(args.num_steps).to(part["x"].device)
    for t, t_next in zip(times, times[1:]):
        v = policy.velocity(x_t, t.expand(len(x_t)), ctx)
        x_t, _ = sde.transition(x_t, v, t, t_next, sigma=0)      # without noise: the ODE's step
    x_0 = part["x"][:, -1]
    new, old = (torch.distributions.Normal(mean, args.noise_level).log_prob(part["chunk"])
                for mean in (credited(policy, x_t, x_0), x_0))
    return ((new - old) * part["mask"][..., None]).sum((1, 2))
