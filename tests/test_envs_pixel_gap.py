"""envs/pixel_gap.py: the picture against a slow drawing, scenes and variants, seeds, the physics,
the expert; a policy that reads the gap off the picture solves it."""

import numpy as np
import pytest
import torch

from conftest import expert_plan
from envs import gap_world, pixel_gap
from envs.pixel_gap import PixelGap

SEEDS = gap_world.episode_seeds("test", 200)


@pytest.mark.parametrize("gap_y", [-0.3, -0.07, 0.0, 0.125, 0.29])
def test_a_wall_pixel_is_as_white_as_the_wall_covers_it(gap_y):
    """Against a drawing a hundred times finer: the share of each pixel's height that is wall."""
    background, half = np.full((16, 16, 3), 40, np.uint8), 0.1
    image = pixel_gap.picture(background, gap_y, half).astype(int)
    fine = 1 - (np.arange(1600) + 0.5) / 800                                # y from 1 down to -1
    wall = (np.abs(fine - gap_y) > half).reshape(16, 100).mean(1)
    wanted = 40 + wall * (255 - 40)
    assert np.abs(image[:, :, 7:9] - wanted[None, :, None]).max() <= 2.5    # a hundredth, rounded
    rest = np.delete(image, [7, 8], axis=2)
    assert (rest == 40).all() and image.shape == (3, 16, 16)


def gap_seen(rgb):
    """The middle of the hole in the wall of pictures (N, 1, 3, 16, 16), from what is not white."""
    centres = 1 - (np.arange(16) + 0.5) / 8
    hole = (255.0 - rgb[:, 0, :, :, 7].float().numpy()).max(1)              # (N, 16)
    return (hole * centres).sum(1) / hole.sum(1)


def test_the_picture_shows_where_the_gap_is():
    world = PixelGap()
    world.change({"textures": "unseen", "gaps": "unseen"})
    obs = world.reset(SEEDS)
    assert np.abs(gap_seen(obs["rgb"]) - world.gap_y).max() < 0.06


def test_who_reads_the_gap_off_the_picture_solves_every_variant():
    for _, variant, changes in pixel_gap.VARIANTS:
        world = PixelGap()
        world.change(changes)

        def act(obs):
            state = np.column_stack([obs["state"].numpy(), gap_seen(obs["rgb"])])
            return torch.from_numpy(expert_plan(state.astype(np.float32), 1)), {}

        assert world.play(act, SEEDS)[0].mean() > 0.95, variant


def test_training_has_as_many_scenes_as_asked_each_with_one_texture_and_one_gap():
    world = PixelGap(scenes=5)
    obs = world.reset(gap_world.episode_seeds("train", 300))
    pictures = {image.numpy().tobytes() for image in obs["rgb"]}
    assert len(pictures) == 5 and len(set(world.gap_y)) == 5
    assert len({(image.numpy().tobytes(), gap) for image, gap in zip(obs["rgb"], world.gap_y)}) == 5


def textures_of(rgb):
    """The backgrounds without the wall's two columns."""
    return {np.delete(image.numpy(), [7, 8], axis=-1).tobytes() for image in rgb}


def test_the_variants_change_what_they_say_and_nothing_else():
    world = PixelGap()
    base = world.reset(SEEDS)
    gaps, positions = world.gap_y, world.position
    seen = textures_of(base["rgb"])
    trained_gaps = {pixel_gap.gap_of(scene) for scene in range(64)}
    for _, variant, changes in pixel_gap.VARIANTS[1:]:
        world.change(changes)
        other = world.reset(SEEDS)
        new_textures, new_gaps = ("textures" in variant), ("gaps" in variant)
        assert bool(textures_of(other["rgb"]) & seen) != new_textures, variant
        assert (len(textures_of(other["rgb"])) <= 64) and bool(
            set(world.gap_y) & trained_gaps) != new_gaps, variant
        if not new_gaps:
            np.testing.assert_array_equal(world.gap_y, gaps)
        farther = np.abs(world.position[:, 1])
        if "farther" in variant:
            assert farther.min() >= 0.8 and farther.max() <= 1 and world.position[0, 0] == -0.8
        else:
            np.testing.assert_array_equal(world.position, positions)
    world.change({})
    assert torch.equal(world.reset(SEEDS)["rgb"], base["rgb"])              # as in training again


def test_a_seed_is_an_episode_alone_and_in_company():
    world = PixelGap()
    together = world.reset(SEEDS[:20])
    for i in (0, 7, 19):
        alone = world.reset(SEEDS[i:i + 1])
        for name in together:
            assert torch.equal(alone[name][0], together[name][i]), name


def test_an_observation_tells_no_gap_but_in_the_picture_which_stays():
    world = PixelGap()
    success, rows = world.play(
        lambda obs: (torch.randn(len(obs["state"]), 4, 2), {}), SEEDS[:50])
    assert rows["state"].shape[1:] == (2,) and rows["rgb"].shape[1:] == (1, 3, 16, 16)
    assert rows["rgb"].dtype == torch.uint8 and not success.all()
    for e in range(50):
        own = rows["rgb"][rows["episode"] == e]
        assert (own == own[0]).all()


def test_demonstrations_start_near_the_middle_and_succeed():
    world = PixelGap(demos=True)
    success, rows = world.play(lambda obs: (obs["action"][:, None], {}), SEEDS)
    assert success.all()
    first = np.unique(rows["episode"].numpy(), return_index=True)[1]
    starts = rows["state"][first, 1].abs()
    assert starts.max() <= 0.3 and starts.max() > 0.25
