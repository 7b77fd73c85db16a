"""The policy of results/meaning: what it sees and reads, its pretrained eyes, its clone."""

import importlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
flow = importlib.import_module("01_flow_policy")
from envs import two_gaps  # noqa: E402  (the lines above tell where)
from envs.gap_world import episode_seeds  # noqa: E402
from envs.workers import scripted_demos  # noqa: E402
from policies.critic import Critic  # noqa: E402
from policies.small import SmallImagePolicy, spatial_softmax  # noqa: E402
from tools import files  # noqa: E402

SCENES, DEMOS, FOLDER = 64, 48, "runs/meaning"


class AskedPolicy(SmallImagePolicy):
    """The sentence decides what in the picture is looked at (FiLM: it scales and shifts features)
    before the spatial softmax says where that is."""

    def __init__(self):
        maps, sentence = 16, 64
        super().__init__(horizon=4, action_dim=2, state_dim=2, cameras=1, language=True, width=128,
                         depth=3, context=2 + 2 * maps + sentence)  # the state; x and y of a map
        self.image_encoder = nn.Sequential(nn.Conv2d(3, 32, 3), nn.SiLU())
        self.film, self.maps = nn.Linear(sentence, 2 * 32), nn.Conv2d(32, maps, 1)

    def encode(self, obs):
        """obs: state (B, 2), rgb (B, 1, 3, 16, 16) and tokens (B, L) uint8 -> ctx (B, 98)."""
        pixels = obs["rgb"].flatten(1)                                            # (B, 768)
        both = torch.cat([pixels, obs["tokens"]], dim=1)
        both, which = both.unique(dim=0, return_inverse=True)   # few in a batch: each once, n
        images, tokens = both.split([pixels.shape[1], obs["tokens"].shape[1]], dim=1)
        text = self.read(tokens)                                                  # (n, 64)
        features = self.image_encoder(images.view(-1, 3, 16, 16).float() / 255 - 0.5)
        scale, shift = self.film(text)[:, :, None, None].chunk(2, dim=1)
        maps = self.maps(F.silu(features * (1 + scale) + shift))                  # (n, 16, h, w)
        places = spatial_softmax(3 * maps)                             # 3: sharper from the start
        return torch.cat([self.feel(obs), torch.cat([places, text], dim=1)[which]], dim=1)


class SharedCritic(Critic):
    """A critic whose error trains the encoder, too; the gradients of both are clipped as one."""

    def forward(self, ctx, elapsed):
        return self.net(torch.cat([ctx, elapsed[:, None]], -1))[:, 0]


def eyes(steps=3000):
    """A policy that has learned where the named gap is, with every pair and sentence, with and
    without a third gap, and nothing about how to move: one for all seeds."""
    path = Path(FOLDER, "eyes.pt")
    torch.manual_seed(0)
    policy = AskedPolicy()
    if not path.exists():
        parts, everything = [], [*two_gaps.SEEN_PAIRS, *two_gaps.UNSEEN_PAIRS]
        for i, (sentence, third, gaps) in enumerate(
                (sentence, third, gaps) for sentence in two_gaps.SENTENCES
                for third in (False, True) for gaps in ("seen", "unseen")):
            world = two_gaps.TwoGaps(scenes=10**6)
            world.change({"sentence": sentence, "third": third, "gaps": gaps, "pairs": everything})
            obs = world.reset(episode_seeds("demo", 1000, 2**20, i))
            parts.append({**obs, "gap": torch.from_numpy(world.gap_y).float()})
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        head = nn.Linear(policy.context_dim, 1)
        optimizer = torch.optim.AdamW([*policy.parameters(), *head.parameters()], lr=1e-3)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            part = flow.take(rows, torch.randint(len(rows["gap"]), (64,)))
            loss = (head(policy.encode(part))[:, 0] - part["gap"]).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
        path.parent.mkdir(parents=True, exist_ok=True)
        files.save(policy.state_dict(), path)
    policy.load_state_dict(torch.load(path, weights_only=True))
    return policy


def clone_of(seed, steps=1500):
    """These eyes, after SFT on the seed's demonstrations."""
    path, policy = Path(FOLDER, f"sft_seed{seed}.pt"), eyes()
    if not path.exists():
        torch.manual_seed(seed)
        world = two_gaps.TwoGaps(SCENES, demos=True)
        world.change({"starts": (0.0, 0.3)})   # as PixelGap's demonstrations
        demos = scripted_demos(world, [episode_seeds("demo", 10 * DEMOS, seed)], DEMOS)
        chunks = torch.cat([flow.sliding_chunks(actions, policy.horizon) for _, actions in demos])
        obs = {name: torch.cat([obs[name] for obs, _ in demos]) for name in demos[0][0]}
        flow.train_sft(policy, obs, chunks, steps, batch_size=64)
        files.save(policy.state_dict(), path)
    policy.load_state_dict(torch.load(path, weights_only=True))
    return policy
