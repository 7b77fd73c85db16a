"""05 --task PixelGap as a user runs it, and pictures that are encoded once."""

import csv
import importlib

import pytest
import torch

from conftest import result_line, run_script, wrong_call
from envs import pixel_gap as world
from policies.small import SmallImagePolicy

flow = importlib.import_module("01_flow_policy")


@pytest.mark.parametrize("flags, named", [
    ("--video 2", "--video"), ("--obs state", "--obs"), ("--max-steps 9", "--max-steps"),
    ("--demo-noise 0.3", "--demo-noise"), ("--algo ppo --beta 2", "--beta"),
    ("--scenes 0", "--scenes"), ("--algo ppo --target-kl 0", "--target-kl"),
    ("--target-kl 0.1", "--target-kl"), ("--task PickCube-v1 --scenes 9", "--scenes")])
def test_what_pixel_gap_does_not_use_is_refused_in_one_line(flags, named):
    assert named in wrong_call("05_train_maniskill.py", "--task", "PixelGap", *flags.split())


@pytest.mark.parametrize("algo", ["stepnft", "ppo"])
def test_05_plays_pixel_gap_and_tests_it_out_of_distribution(algo, tmp_path):
    done = run_script("05_train_maniskill.py", "--task", "PixelGap", "--algo", algo, "--iterations",
                      2, "--episodes", 16, "--sft-steps", 50, "--eval-every", 1, "--eval-episodes",
                      16, "--test-episodes", 50, "--ood-episodes", 20, "--eval-ood", "--out", "out",
                      cwd=tmp_path)
    assert result_line(done)["episodes"] == 32
    with open(tmp_path / "out/test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["variant"] for row in rows} == {variant for _, variant, _ in world.VARIANTS}
    again = run_script("05_train_maniskill.py", "--eval-only", "out/last.pt", cwd=tmp_path)
    assert result_line(again)["success"] == result_line(done)[algo]


def test_pictures_that_are_encoded_once_are_encoded_alike():
    """The rows of a batch that share a picture, and a row alone."""
    policy = SmallImagePolicy(4, 2, 2, cameras=1, width=16)
    scenes = torch.randint(0, 256, (5, 1, 3, 16, 16), dtype=torch.uint8)
    which = torch.randint(5, (40,))
    obs = {"state": torch.randn(40, 2), "rgb": scenes[which]}
    ctx = policy.encode(obs)
    assert ctx.shape == (40, policy.context_dim)
    for i in range(40):
        alone = policy.encode(flow.take(obs, slice(i, i + 1)))
        torch.testing.assert_close(ctx[i:i + 1], alone)
    ctx.pow(2).sum().backward()
    shared = [p.grad.clone() for p in policy.image_encoder.parameters()]
    policy.zero_grad()
    torch.cat([policy.encode(flow.take(obs, slice(i, i + 1))) for i in range(40)]
              ).pow(2).sum().backward()
    for mine, theirs in zip(shared, policy.image_encoder.parameters()):
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-4, atol=1e-5)
