"""policies/small.py and the names in policies/__init__.py: what each kind of policy sees, that it
comes back from its config, and which action dims earn credit."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import conftest  # noqa: F401  (the way to the scripts)
import policies
from envs.workers import tokens
from policies import load_policy, small
from policies.small import RobotPolicy, SlotPolicy, SmallImagePolicy
from tools import run

flow = importlib.import_module("01_flow_policy")
SENTENCES = ["pick up the milk", "pick up the butter", "open the drawer"]


def told(sentences):
    return torch.tensor(np.stack([tokens(sentence) for sentence in sentences]))


def robot_policy():
    return RobotPolicy(4, 3, state_dim=14, cameras=2, language=True, width=32)


def slot_policy():
    return SlotPolicy(4, 3, state_dim=5 + 9, slots=3, width=32)


def small_image_policy():
    return SmallImagePolicy(4, 3, state_dim=14, cameras=1, width=32)


def full_obs(sentences=SENTENCES, cameras=2, size=64):
    B = len(sentences)
    return {"state": torch.randn(B, 14), "tokens": told(sentences),
            "rgb": torch.randint(0, 256, (B, cameras, 3, size, size), dtype=torch.uint8)}


# ------------------------------------------------------------------------------------------------
# What a policy sees


# two numbers for 64 maps of each camera, 64 for the sentence, three for each of four glances
@pytest.mark.parametrize("make, size", [(robot_policy, 14 + 2 * 2 * 64 + 64),
                                        (slot_policy, 5 + 64 + 4 * 3)])
def test_all_that_is_seen_makes_one_context(make, size):
    policy, obs = make(), full_obs()
    ctx = policy.encode(obs)
    assert ctx.shape == (3, size) == (3, policy.context_dim)
    v = policy.velocity(torch.randn(3, 4, 3), torch.rand(3), ctx)
    assert v.shape == (3, 4, 3) and v.isfinite().all()


@pytest.mark.parametrize("senses, size", [
    ({}, 14), ({"cameras": 1}, 14 + 128), ({"language": True}, 14 + 64),
    ({"slots": 2}, 8 + 64 + 12)])
def test_what_a_policy_does_not_have_it_does_not_need(senses, size):
    policy = (SlotPolicy if "slots" in senses else RobotPolicy)(4, 3, 14, **senses)
    obs = {"state": torch.randn(3, 14)}
    if "cameras" in senses:
        obs["rgb"] = full_obs()["rgb"][:, :1]
    if "language" in senses or "slots" in senses:
        obs["tokens"] = told(SENTENCES)
    assert policy.encode(obs).shape == (3, size) == (3, policy.context_dim)
    assert flow.ode_sample(policy, obs, 2).shape == (3, 4, 3)


@pytest.mark.parametrize("make, change", [
    (robot_policy, "state"), (robot_policy, "rgb"), (robot_policy, "tokens"),
    (slot_policy, "state"), (slot_policy, "tokens")])
def test_each_kind_of_observation_changes_the_velocity(make, change):
    policy, a, b = make(), full_obs(SENTENCES[:1]), full_obs(SENTENCES[1:2])
    x_t, t = torch.randn(1, 4, 3), torch.rand(1)
    v = policy.velocity(x_t, t, policy.encode(a))
    v_changed = policy.velocity(x_t, t, policy.encode({**a, change: b[change]}))
    assert (v - v_changed).abs().max() > 1e-6  # an untrained net looks nowhere in particular


@pytest.mark.parametrize("make", [robot_policy, slot_policy])
def test_the_state_comes_in_the_units_of_the_demonstrations(make):
    policy, obs = make(), full_obs()
    seen = 14 if make is robot_policy else 5           # of slots the places alone, see below
    policy.fit_normalisation({"state": 3 + 2 * torch.randn(500, 14)}, torch.rand(500, 4, 3))
    centre, scale = policy.state_centre[:seen], policy.state_scale[:seen]
    assert (centre - 3).abs().max() < 0.5 and (scale - 2).abs().max() < 0.3
    torch.testing.assert_close(policy.encode(obs)[:, :seen],
                               (obs["state"][:, :seen] - centre) / scale)


def test_the_two_cameras_are_told_apart():
    policy, obs = robot_policy(), full_obs(SENTENCES[:1])
    swapped = {**obs, "rgb": obs["rgb"].flip(1)}
    a, b = (policy.encode(z)[0, 14:-64].view(2, 128) for z in (obs, swapped))
    assert (a - b).abs().max() > 1e-4
    torch.testing.assert_close(a, b.flip(0))           # and seen alike


def test_an_image_is_scaled_before_it_is_seen():
    """Dark and bright images keep the convolutions' inputs of order one, so maps stay apart."""
    policy, seen = robot_policy(), []
    policy.image_encoder[0].register_forward_hook(
        lambda layer, inputs, output: seen.append(inputs[0]))
    obs = full_obs(SENTENCES[:2])
    obs["rgb"] = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1, 1).expand(2, 2, 3, 64,
                                                                                      64)
    policy.encode(obs)
    wanted = torch.tensor([-0.5, -0.5, 0.5, 0.5])
    torch.testing.assert_close(seen[0].flatten(1).mean(1), wanted)


def test_a_feature_is_the_mean_position_of_its_map():
    maps = torch.randn(2, 3, 4, 6)
    points = small.spatial_softmax(maps)
    assert points.shape == (2, 6)
    for image in range(2):
        for channel in range(3):
            total = x = y = 0.0
            for row in range(4):
                for column in range(6):
                    weight = maps[image, channel, row, column].exp().item()
                    total += weight
                    x += weight * (2 * column / 5 - 1)
                    y += weight * (2 * row / 3 - 1)
            assert points[image, channel].item() == pytest.approx(x / total, abs=1e-5)
            assert points[image, 3 + channel].item() == pytest.approx(y / total, abs=1e-5)


@pytest.mark.parametrize("make", [robot_policy, slot_policy])
def test_encoding_a_batch_is_encoding_one_by_one(make):
    policy, obs = make(), full_obs([*SENTENCES, SENTENCES[0]])
    alone = [policy.encode(flow.take(obs, torch.tensor([i]))) for i in range(4)]
    torch.testing.assert_close(policy.encode(obs), torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sentence", ["fetch Großmutters 茶", "", "word " * 100])
def test_unseen_words_are_no_error(sentence):
    policy = RobotPolicy(1, 1, 1, language=True)
    ctx = policy.encode({"state": torch.zeros(2, 1), "tokens": told([sentence, SENTENCES[0]])})
    assert ctx.isfinite().all() and (ctx[0] - ctx[1]).abs().max() > 1e-4


def test_different_sentences_differ_and_capitals_do_not():
    policy = RobotPolicy(1, 1, 1, language=True)
    ctx = policy.encode({"state": torch.zeros(4, 1), "tokens": told([*SENTENCES,
                                                                     "Pick up the MILK"])})
    assert all((ctx[i] - ctx[j]).abs().max() > 1e-4 for i in range(3) for j in range(i))
    torch.testing.assert_close(ctx[3], ctx[0])


def test_the_sentence_alone_decides_which_slots_are_looked_at():
    """Shift one slot: the glances move by ten times their weight on it, whatever the rest is."""
    policy = SlotPolicy(2, 2, state_dim=5 + 9, slots=3, width=16)
    policy.attention.weight.data *= 30
    weights = {}
    for i, sentence in enumerate(SENTENCES[:2]):
        for slot in range(3):
            state = torch.randn(1, 14)
            other = state.clone()
            other[:, 5 + 3 * slot:8 + 3 * slot] += 1
            a, b = (policy.encode({"state": z, "tokens": told([sentence])})[0]
                    for z in (state, other))
            assert torch.equal(a[:5 + 64], b[:5 + 64])
            moved = (b - a)[-12:].view(4, 3)
            torch.testing.assert_close(moved, moved[:, :1].expand(4, 3), rtol=1e-3, atol=1e-3)
            again = policy.encode({"state": torch.zeros(2, 14).index_fill_(
                1, torch.arange(5 + 3 * slot, 8 + 3 * slot), 1.0), "tokens": told([sentence] * 2)})
            torch.testing.assert_close(again[:, -12:].view(2, 4, 3)[0], moved, rtol=1e-3,
                                       atol=1e-3)
            weights[i, slot] = moved[:, 0] / 10
        total = sum(weights[i, slot] for slot in range(3))
        torch.testing.assert_close(total, torch.ones(4), rtol=1e-3, atol=1e-3)
    assert max((weights[0, slot] - weights[1, slot]).abs().max() for slot in range(3)) > 0.1


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


def test_a_picture_or_a_sentence_in_many_rows_is_encoded_once():
    images, robot, seen = small_image_policy(), robot_policy(), []
    images.image_encoder.register_forward_hook(lambda layer, inputs, maps: seen.append(len(maps)))
    robot.sentence_encoder.register_forward_hook(lambda layer, inputs, text: seen.append(len(text)))
    obs = full_obs(SENTENCES, cameras=1, size=16)
    many = flow.take(obs, torch.tensor([0, 1, 0, 2, 2, 1, 0]))
    images.encode(many)
    robot.read(many["tokens"])
    assert seen == [3, 3]


# ------------------------------------------------------------------------------------------------
# Policies by name


@pytest.mark.parametrize("make", [robot_policy, slot_policy, small_image_policy])
def test_a_policy_is_built_again_from_its_config(make):
    """The same class with the same shapes, whatever was asked for; nothing is left to a default."""
    policy = make()
    again = policies.build_policy(policy.config)
    assert type(again) is type(policy) and again.config == policy.config
    assert {name: p.shape for name, p in again.state_dict().items()} == {
        name: p.shape for name, p in policy.state_dict().items()}
    for name, value in policy.config.items():
        if name != "kind":
            changed = {**policy.config, name: not value if type(value) is bool else value + 1}
            assert policies.build_policy(changed).config == changed


def test_every_kind_has_a_name_of_its_own():
    kinds = [RobotPolicy, SlotPolicy, SmallImagePolicy, policies.PI0Policy]
    assert [kind.kind for kind in kinds] == ["robot", "slots", "small_images", "pi0"]


@pytest.mark.parametrize("make", [robot_policy, slot_policy, small_image_policy])
def test_a_checkpoint_brings_its_policy_back(make, tmp_path):
    policy = make()
    size = 16 if make is small_image_policy else 64
    obs = full_obs(cameras=policy.cameras or 1, size=size)
    policy.fit_normalisation(obs, torch.rand(3, 4, 3))
    run.save(tmp_path / "p.pt", policy, SimpleNamespace(flags={}))
    loaded = load_policy(tmp_path / "p.pt")
    x_t, t = torch.randn(3, 4, 3), torch.rand(3)
    assert torch.equal(loaded.velocity(x_t, t, loaded.encode(obs)),
                       policy.velocity(x_t, t, policy.encode(obs)))
    assert torch.equal(loaded.denormalise(x_t), policy.denormalise(x_t))
    actions = torch.rand(3, 4, 3)
    assert torch.equal(loaded.normalise(actions), policy.normalise(actions))


def test_a_pi0_is_told_its_folder_and_how_many_rows_at_a_time(monkeypatch):
    class Told(policies.PI0Policy):
        def __new__(cls, **options):
            return options

    monkeypatch.setattr(policies, "PI0Policy", Told)
    config = {"kind": "pi0", "folder": "a/folder", "horizon": 3, "train": "all"}
    wanted = {"folder": "a/folder", "horizon": 3, "train": "all", "micro_batch": 5}
    assert policies.build_policy(config, micro_batch=5) == wanted


# ------------------------------------------------------------------------------------------------
# Action dims that hardly move in the demonstrations


def test_dims_that_hardly_move_in_the_demos_earn_no_credit():
    """A dim whose 1 and 99 % quantiles are less than 0.2 apart keeps v_old, without a gradient."""
    policy = RobotPolicy(4, 5, state_dim=2)
    chunks = torch.rand(50, 4, 5) * 2 - 1
    chunks[..., 1], chunks[..., 4] = -1, 0.3 + 0.01 * torch.randn(50, 4)   # one rests, one trembles
    chunks[0, 0, 1] = 1                                   # one outlier in 200 is no movement
    policy.fit_normalisation({"state": torch.randn(50, 2)}, chunks)
    v_theta, v_old = torch.randn(2, 3, 4, 5)
    v_theta.requires_grad_()
    given = policies.credited(policy, v_theta, v_old)
    given.sum().backward()
    for dim in range(5):
        values = sorted(chunks[..., dim].flatten().tolist())
        moves = values[round(0.99 * 199)] - values[round(0.01 * 199)] > 0.2
        assert torch.equal(given[..., dim], (v_theta if moves else v_old)[..., dim])
        assert v_theta.grad[..., dim].unique().tolist() == [float(moves)]
        assert moves == (dim in (0, 2, 3))


def test_credit_begins_at_a_tenth_of_the_range_of_an_action():
    """action_scale is half of what a dim moves; [-1, 1] is two wide."""
    policy, v_theta, v_old = flow.FlowPolicy(1, 4, 2), torch.ones(1, 1, 4), torch.zeros(1, 1, 4)
    policy.action_scale.copy_(torch.tensor([0.05, 0.099, 0.101, 1.0]))
    assert policies.credited(policy, v_theta, v_old).flatten().tolist() == [0, 0, 1, 1]


def test_a_policy_that_does_not_tell_its_range_gets_all_the_credit():
    v_theta, v_old = torch.randn(2, 3, 4, 5)
    assert torch.equal(policies.credited(SimpleNamespace(), v_theta, v_old), v_theta)
    told_more = SimpleNamespace(action_scale=torch.ones(5), half_range=torch.zeros(5))
    assert torch.equal(policies.credited(told_more, v_theta, v_old), v_old)  # it goes first
