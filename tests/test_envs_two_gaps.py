"""envs/two_gaps.py: the picture against a slow drawing, who reads picture and sentence solves every
variant, what training never shows, seeds."""

import numpy as np
import pytest
import torch

from conftest import expert_plan
from envs import gap_world, two_gaps
from envs.two_gaps import COLORS, TwoGaps

SEEDS = gap_world.episode_seeds("test", 60)
HEIGHTS = 1 - (np.arange(16) + 0.5) / 8                                     # of a picture's rows


@pytest.mark.parametrize("centres", [(0.15, -0.45), (0.31, -0.2), (0.45, -0.15)])
def test_a_wall_pixel_mixes_white_and_the_gaps_colour_by_how_much_each_covers(centres):
    """Against a drawing a hundred times finer."""
    colors, half = np.array([COLORS["red"], COLORS["blue"]]), 0.1
    background = np.full((16, 16, 3), 40, np.uint8)
    image = two_gaps.picture(background, list(zip(centres, colors)), half).astype(int)
    fine = 1 - (np.arange(1600) + 0.5) / 800                                # y from 1 down to -1
    drawn = np.full((1600, 3), 255.0)
    for centre, color in zip(centres, colors):
        drawn[np.abs(fine - centre) <= half] = color
    wanted = drawn.reshape(16, 100, 3).mean(1)
    for column in (7, 8):
        assert np.abs(image[:, :, column].T - wanted).max() <= 2.6          # a hundredth, rounded
    assert (np.delete(image, [7, 8], axis=2) == 40).all()


def named(tokens):
    """The colour that a sentence names."""
    sentence = bytes(tokens.numpy()).decode()
    color, = [name for name in COLORS if name in sentence.split()]
    return color


def gap_of(image, color):
    """The middle of what has this colour in the wall of a picture (3, 16, 16): each row of the wall
    is white but for a share of one of the colours."""
    missing = 255.0 - image[:, :, 7].numpy().T                              # (16, 3)
    shares = []
    for row in missing:
        fits = {name: (row @ (255 - np.array(rgb))) / ((255 - np.array(rgb))**2).sum()
                for name, rgb in COLORS.items()}
        off = {name: np.abs(row - share * (255 - np.array(COLORS[name]))).sum()
               for name, share in fits.items()}
        best = min(off, key=off.get)
        seen = best == color and fits[color] > 0.02                   # more than a rounding
        shares.append(fits[color] if seen else 0.0)
    return np.dot(shares, HEIGHTS) / max(np.sum(shares), 1e-9)


def test_who_reads_picture_and_sentence_solves_every_variant_and_the_other_gap_is_closed():
    for _, variant, changes in two_gaps.VARIANTS:
        world = TwoGaps()
        world.change(changes)
        obs = world.reset(SEEDS)
        seen = np.array([gap_of(image, named(words)) for image, words in zip(
            obs["rgb"][:, 0], obs["tokens"])])
        assert np.abs(seen - world.gap_y).max() < 0.06, variant

        def towards(heights):
            def act(obs):
                state = np.column_stack([obs["state"].numpy(), heights]).astype(np.float32)
                return torch.from_numpy(expert_plan(state, 1)), {}
            return world.play(act, SEEDS)[0].mean()

        assert towards(seen) > 0.95 and towards(-seen) < 0.3, variant


def test_training_never_shows_what_a_variant_asks():
    """Pairs, words, order, a third gap; but every colour, above and below."""
    world, pictures = TwoGaps(), {}
    obs = world.reset(gap_world.episode_seeds("train", 1000))
    for image, words in zip(obs["rgb"][:, 0], obs["tokens"]):
        pictures.setdefault(image.numpy().tobytes(), (image, set()))[1].add(named(words))
        assert bytes(words.numpy()).decode().strip() == f"go through the {named(words)} gap"
    pairs, places = set(), set()
    for image, words in pictures.values():
        heights = {name: gap_of(image, name) for name in COLORS}
        shown = {name: height for name, height in heights.items() if abs(height) > 0.1}
        assert len(shown) == 2 and words == set(shown)
        pairs.add(tuple(sorted(shown)))
        places |= {(name, height > 0) for name, height in shown.items()}
    assert len(pictures) == 64 and len(places) == 12
    assert len(pairs) <= 12 and not pairs & {tuple(sorted(p)) for p in two_gaps.UNSEEN_PAIRS}


def test_the_variants_change_what_they_say_and_nothing_else():
    world = TwoGaps()
    base, gaps, start = world.reset(SEEDS), world.gap_y, world.position
    for axis, variant, changes in two_gaps.VARIANTS[1:]:
        world.change(changes)
        other = world.reset(SEEDS)
        assert (torch.equal(base["rgb"], other["rgb"])) == (
            "words" in variant or "starts" in variant), variant
        assert (world.gap_y == gaps).all() == ("unseen gaps" not in variant), variant
        assert (world.position == start).all() == (axis != "execution"), variant
        assert torch.equal(base["tokens"], other["tokens"]) == (
            "words" not in variant and "pairs" not in variant), variant
    world.change({"pairs": two_gaps.UNSEEN_PAIRS})
    obs = world.reset(SEEDS)
    for image, words in zip(obs["rgb"][:, 0], obs["tokens"]):
        shown = [name for name in COLORS if abs(gap_of(image, name)) > 0.1]
        assert tuple(shown) in two_gaps.UNSEEN_PAIRS and named(words) in shown


def test_every_pair_that_is_asked_for_is_shown_and_a_third_gap_in_every_colour_on_both_sides():
    world, everything = TwoGaps(scenes=10**6), [*two_gaps.SEEN_PAIRS, *two_gaps.UNSEEN_PAIRS]
    world.change({"pairs": everything, "third": True})
    obs, pairs, thirds = world.reset(gap_world.episode_seeds("demo", 400)), set(), set()
    for image in obs["rgb"][:, 0]:
        heights = {name: gap_of(image, name) for name in COLORS}
        shown = {name: height for name, height in heights.items() if abs(height) > 0.1}
        third, = [name for name, height in shown.items() if abs(height) > 0.6]
        pairs.add(tuple(name for name in shown if name != third))
        thirds.add((third, shown[third] > 0))
    assert pairs == set(everything) and len(thirds) == 12


def test_a_seed_is_an_episode_alone_and_in_company():
    world = TwoGaps()
    together = world.reset(SEEDS[:20])
    for i in (0, 7, 19):
        alone = world.reset(SEEDS[i:i + 1])
        for name in together:
            assert torch.equal(alone[name][0], together[name][i]), name


def test_demonstrations_succeed():
    world = TwoGaps(demos=True)
    assert world.play(lambda obs: (obs["action"][:, None], {}), SEEDS)[0].all()
