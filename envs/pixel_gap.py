"""PixelGap: GapWorld seen through a camera, the cheap world for questions about images.

The robot knows where it is; where the gap is, it must see: a picture of 16 x 16 pixels shows the
wall, white, with its gap, before a background of coloured blocks. Training has 64 scenes, each a
texture with a gap of its own, so a network may memorise which texture has which gap, or look where
the wall is open. Unseen textures tell the two apart; unseen gaps, both, and starts farther out are
further tests (VARIANTS).

    PixelGap().play(act, seeds) -> (success (episodes,) bool, rows)        as GapWorld.play

Nothing is rendered by a driver: numpy draws a picture once an episode.
"""

import functools

import numpy as np
import torch

from envs.gap_world import GapWorld, expert_action

PIXELS, BLOCKS = 16, 4              # a picture's width, and its blocks of colour side by side
UNSEEN, UNSEEN_FROM = 64, 10**6     # how many textures no training has, and their first number
TRAINING = 0.0, 0.8                 # |y| of the starts, in metres
VARIANTS = [("in-distribution", "as in training", {}),
            ("vision", "unseen textures", {"textures": "unseen"}),
            ("vision", "unseen gaps", {"gaps": "unseen"}),
            ("vision", "unseen textures and gaps", {"textures": "unseen", "gaps": "unseen"}),
            ("execution", "starts farther out", {"starts": (0.8, 1.0)})]
# 05's defaults here. No noise on its demos, the expert always arrives; one transition a chunk, as
# PPO and GRPO have
RUN = dict(num_demos=48, sft_steps=1500, iterations=160, episodes=512, eval_every=20,
           eval_episodes=500, test_episodes=1000, ood_episodes=1000, obs="rgb", max_steps=24,
           demo_noise=0.0, transitions="one", out="runs/05_pixel_gap")


@functools.cache
def texture(number):
    """(16, 16, 3) uint8, the same for the same number: 4 x 4 blocks of random colours."""
    blocks = np.random.default_rng([1, number]).integers(0, 256, (BLOCKS, BLOCKS, 3), np.uint8)
    return blocks.repeat(PIXELS // BLOCKS, 0).repeat(PIXELS // BLOCKS, 1)


def seen_gap(u):
    """u in [-1, 1] -> the gap's centre in training: up to 0.3 m from the middle as in GapWorld, but
    never from 0.1 to 0.2."""
    return 0.2 * u + 0.1 * np.sign(u) * (abs(u) > 0.5)


def unseen_gap(u):
    """u in [-1, 1] -> a centre that training leaves out: 0.1 to 0.2 m from the middle."""
    return 0.1 * u + 0.1 * np.sign(u)


@functools.cache
def gap_of(scene):
    """The gap's centre in a training scene, in metres."""
    return float(seen_gap(np.random.default_rng([2, scene]).uniform(-1, 1)))


def picture(background, gap_y, half):
    """(3, 16, 16) uint8: background (16, 16, 3), and a wall two pixels wide, open within `half` of
    gap_y. Row 0 is y = 1. A pixel that the gap covers by half is half as white."""
    edges = np.linspace(1, -1, PIXELS + 1)                                    # (17,) upper to lower
    covered = np.minimum(edges[:-1], gap_y + half) - np.maximum(edges[1:], gap_y - half)
    wall = 1 - np.clip(covered / (2 / PIXELS), 0, 1)[:, None, None]           # (16, 1, 1)
    image = background.astype(np.float32)
    middle = slice(PIXELS // 2 - 1, PIXELS // 2 + 1)
    image[:, middle] = (1 - wall) * image[:, middle] + wall * 255
    return image.round().astype(np.uint8).transpose(2, 0, 1)


class PixelGap(GapWorld):
    """GapWorld whose observation is state (N, 2), the robot's x and y, and rgb (N, 1, 3, 16, 16)
    uint8, one camera.

    scenes: how many training scenes there are. demos: start near the middle, and observe the
    scripted expert's action as well.
    """

    radius = 0.04  # of the robot: its centre must be within `gap` (0.06) of the middle, so the
    # gap that is drawn has a half-width of 0.1; a pixel is 0.125 high

    def __init__(self, scenes=64, demos=False):
        super().__init__()
        self.scenes, self.demos = scenes, demos
        self.change({"starts": (0.0, 0.3)} if demos else {})

    def change(self, changes):
        """The next episodes; what is not named is as in training. textures, gaps: "seen", those of
        the scene that an episode draws, or "unseen"; starts: from which |y| to which."""
        training = {"textures": "seen", "gaps": "seen", "starts": TRAINING}
        self.textures, self.gaps, self.starts = {**training, **changes}.values()

    def reset(self, seeds):
        """One episode per seed -> obs. A seed draws the start, the scene and what is unseen."""
        rngs, count = [np.random.default_rng(int(seed)) for seed in seeds], len(seeds)
        y, gap_y = np.array([rng.uniform(-1, 1, 2) for rng in rngs]).T
        scenes = [int(rng.integers(self.scenes)) for rng in rngs]
        others = [UNSEEN_FROM + int(rng.integers(UNSEEN)) for rng in rngs]
        low, high = self.starts
        y = np.sign(y) * (low + (high - low) * np.abs(y))
        self.position = np.column_stack([np.full(count, -0.8), y])
        self.gap_y = unseen_gap(gap_y)
        if self.gaps == "seen":
            self.gap_y = np.array([gap_of(scene) for scene in scenes])
        backgrounds = map(texture, scenes if self.textures == "seen" else others)
        images = [picture(background, middle, self.gap + self.radius)
                  for background, middle in zip(backgrounds, self.gap_y)]
        self.rgb = torch.from_numpy(np.stack(images))   # as it is for the whole episode
        self.steps = np.zeros(count, int)
        self.over, self.success = np.zeros((2, count), bool)
        return self.observe()

    def observe(self):
        obs = {"state": torch.from_numpy(self.position.astype(np.float32)),
               "rgb": self.rgb[:, None]}
        if self.demos:
            true_state = np.column_stack([self.position, self.gap_y]).astype(np.float32)
            obs["action"] = torch.from_numpy(expert_action(true_state))
        return obs

    def close(self):
        """Nothing runs; 05 closes its worlds."""
