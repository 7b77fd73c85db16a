"""TwoGaps: PixelGap with two gaps of different colours, and a sentence that says which is open.

The cheap world for questions about meaning. A picture shows both gaps; "go through the red gap"
names one, and the other is closed. Six colours make 15 pairs, of which training has 12. Like
PixelGap it has 64 training scenes, each a texture with two gaps and their colours. VARIANTS ask
what was never asked in training: pairs never seen together, other words, another order of words, a
third gap; and, as PixelGap, textures, gaps and starts never seen.

    TwoGaps().play(act, seeds) -> (success (episodes,) bool, rows)        as GapWorld.play
"""

import functools
import itertools

import numpy as np
import torch

from envs.gap_world import expert_action
from envs.pixel_gap import PIXELS, UNSEEN, UNSEEN_FROM, PixelGap, texture
from envs.workers import tokens

COLORS = {"red": (230, 0, 0), "green": (0, 150, 0), "blue": (30, 60, 255), "yellow": (255, 220, 0),
          "purple": (160, 0, 200), "orange": (255, 130, 0)}
UNSEEN_PAIRS = [("red", "green"), ("blue", "yellow"), ("purple", "orange")]
SEEN_PAIRS = [pair for pair in itertools.combinations(COLORS, 2) if pair not in UNSEEN_PAIRS]
SENTENCES = {"seen": "go through the {} gap", "words": "take the {} opening",
             "order": "the {} gap is where to go through"}
VARIANTS = [("in-distribution", "as in training", {}),
            ("semantic", "pairs never seen together", {"pairs": UNSEEN_PAIRS}),
            ("semantic", "other words", {"sentence": "words"}),
            ("semantic", "another order of words", {"sentence": "order"}),
            ("semantic", "a third gap", {"third": True}),
            ("vision", "unseen textures", {"textures": "unseen"}),
            ("vision", "unseen gaps", {"gaps": "unseen"}),
            ("execution", "starts farther out", {"starts": (0.8, 1.0)})]


def gap_of(u, gaps):
    """u in [0, 1] -> how far a gap's centre is from the middle (m): in training 0.15 to 0.25 or
    0.35 to 0.45, unseen what lies between."""
    if gaps == "unseen":
        return 0.25 + 0.1 * u
    return 0.15 + 0.2 * u + (0.1 if u > 0.5 else 0)


@functools.cache
def grey(number):
    """PixelGap's texture without its colours, (16, 16, 3): the gaps' are the only ones."""
    return texture(number).mean(-1, keepdims=True).repeat(3, -1)


def picture(background, gaps, half):
    """(3, 16, 16) uint8: background (16, 16, 3), and a wall two pixels wide, white but for gaps,
    [(centre, colour), ...]. Row 0 is y = 1; a pixel that a gap covers by half has half of both."""
    edges = np.linspace(1, -1, PIXELS + 1)                                    # (17,) upper to lower
    wall = np.full((PIXELS, 1, 3), 255.0)
    for centre, color in gaps:
        covered = np.minimum(edges[:-1], centre + half) - np.maximum(edges[1:], centre - half)
        share = np.clip(covered / (2 / PIXELS), 0, 1)[:, None, None]          # (16, 1, 1)
        wall = (1 - share) * wall + share * np.array(color)
    image = background.astype(np.float32)
    image[:, PIXELS // 2 - 1:PIXELS // 2 + 1] = wall
    return image.round().astype(np.uint8).transpose(2, 0, 1)


@functools.cache
def scene(number):
    """What a training scene is: (texture, (upper u, lower u), a number for its pair, swapped?)."""
    rng = np.random.default_rng([3, number])
    places = tuple(rng.uniform(0, 1, 2))
    return number, places, int(rng.integers(2**16)), rng.random() < 0.5


class TwoGaps(PixelGap):
    """PixelGap's observation, and tokens (N, 128) uint8, the sentence. gap_y is the named gap's
    centre: GapWorld closes the wall everywhere else."""

    def change(self, changes):
        """The next episodes; what is not named is as in training. See VARIANTS."""
        training = {"textures": "seen", "gaps": "seen", "starts": (0.0, 0.8), "pairs": SEEN_PAIRS,
                    "sentence": "seen", "third": False}
        self.changes = {**training, **changes}

    def reset(self, seeds):
        """One episode per seed -> obs. A seed draws the start, the scene and which gap is named."""
        changes, count = self.changes, len(seeds)
        low, high = changes["starts"]
        images, words, heights, gap_y = [], [], [], []
        for seed in seeds:
            rng = np.random.default_rng(int(seed))
            y, named, other = rng.uniform(-1, 1), int(rng.integers(2)), int(rng.integers(UNSEEN))
            background, us, pair, swapped = scene(int(rng.integers(self.scenes)))
            if changes["textures"] == "unseen":
                background = UNSEEN_FROM + other
            if changes["gaps"] == "unseen":
                us = rng.uniform(0, 1, 2)
            names = changes["pairs"][pair % len(changes["pairs"])]
            names = names[::-1] if swapped else names
            centres = [side * gap_of(u, changes["gaps"]) for side, u in zip((1, -1), us)]
            gaps = [(centre, COLORS[name]) for centre, name in zip(centres, names)]
            if changes["third"]:  # above or below both, of a colour that neither has
                third = [name for name in COLORS if name not in names][other % 4]
                gaps.append(((0.75, -0.75)[other // 4 % 2], COLORS[third]))
            images.append(picture(grey(background), gaps, self.gap + self.radius))
            words.append(tokens(SENTENCES[changes["sentence"]].format(names[named])))
            heights.append(np.sign(y) * (low + (high - low) * abs(y)))
            gap_y.append(centres[named])
        self.position = np.column_stack([np.full(count, -0.8), heights])
        self.gap_y, self.rgb = np.array(gap_y), torch.from_numpy(np.stack(images))
        self.tokens = torch.from_numpy(np.stack(words))
        self.steps = np.zeros(count, int)
        self.over, self.success = np.zeros((2, count), bool)
        return self.observe()

    def observe(self):
        return {**super().observe(), "tokens": self.tokens}
