"""policies/pi0.py against transformers' own pi0: a tiny one with random weights, written and read
back, without a hub. Then 01 to 04 with it, on LIBERO's images."""

import copy
import importlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ROOT, wrong_call
from envs import libero
from envs.workers import follow_expert, tokens
from policies import credited, load_policy, pi0
from test_envs_libero import gl, kept_simulators, recorded  # noqa: F401 (fixtures)
from tools import run
from toy_robot import ran

study, flow, sde, nft = map(importlib.import_module, (
    "results.pi0.run", "01_flow_policy", "02_sde_sampler", "03_step_loss"))
ROBOT = dict(horizon=4, action_dim=7, state_dim=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pi0")
    study.make_tiny(path, pixels=28, patch=14)
    return path


def make(folder, train="expert", micro_batch=32):
    """The same policy each time, its statistics those of some demonstrations."""
    policy = pi0.PI0Policy(folder, **ROBOT, train=train, micro_batch=micro_batch)
    torch.manual_seed(1)
    policy.fit_normalisation({"state": torch.randn(9, 6)}, torch.rand(9, 4, 7) * 2 - 1)
    return policy


def observation(rows, size=48):
    """Sentences of several lengths."""
    torch.manual_seed(2)
    said = ["pick the soup", "pick it", "pick up the cream cheese and place it in the basket"]
    return {"state": torch.randn(rows, 6),
            "rgb": torch.randint(256, (rows, 2, 3, size, size), dtype=torch.uint8),
            "tokens": torch.stack([torch.tensor(tokens(said[i % 3])) for i in range(rows)])}


def noise(rows):
    torch.manual_seed(3)
    return torch.randn(rows, 4, 8)


# ------------------------------------------------------------------------------------------------
# The network


def test_importing_loads_no_transformers(loaded_by_imports):
    assert "policies" in loaded_by_imports and "transformers" not in loaded_by_imports


def test_its_samples_are_those_of_sample_actions(folder):
    policy, obs, x_1 = make(folder), observation(3), noise(3)
    wanted = policy.model.sample_actions(state=policy.normalised_state(obs), noise=x_1, num_steps=5,
                                         **policy.vlm_inputs(obs))
    assert torch.allclose(flow.ode_sample(policy, obs, 5, x_1), wanted, atol=1e-5)
    assert (wanted - x_1).abs().max() > 0.1


@pytest.mark.parametrize("train", ["expert", "all"])
def test_a_velocity_from_the_kept_prefix_is_that_of_a_full_pass(folder, train):
    policy, obs, x_t, t = make(folder, train), observation(3), noise(3), torch.rand(3)
    ctx = policy.encode(obs)
    for time in (t, t / 2):                     # the second must not see what the first has added
        wanted = policy.model(state=policy.normalised_state(obs), noise=x_t, timestep=time,
                              **policy.vlm_inputs(obs)).logits
        assert torch.allclose(policy.velocity(x_t, time, ctx), wanted, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours(folder):
    """Sentences are padded to the longest: an image, a sentence, a state and a chunk stay alone.
    In 32 bits: bfloat16 rounds otherwise in a batch of another shape."""
    policy, obs, x_t, t = make(folder, "all"), observation(3), noise(3), torch.rand(3)
    together = policy.velocity(x_t, t, policy.encode(obs))
    for i in range(3):
        alone = flow.take(obs, slice(i, i + 1))
        v = policy.velocity(x_t[i:i + 1], t[i:i + 1], policy.encode(alone))
        assert torch.allclose(v, together[i:i + 1], atol=1e-5)
        for name in obs:                        # and each of its parts counts
            other = {**alone, name: obs[name][(i + 1) % 3][None]}
            v = policy.velocity(x_t[i:i + 1], t[i:i + 1], policy.encode(other))
            assert (v - together[i:i + 1]).abs().max() > 1e-5, name


def test_any_bytes_are_a_sentence(folder):
    """An idle simulator shows zeros, which say nothing; 128 bytes may end inside a letter."""
    policy, obs = make(folder), observation(4)
    obs["tokens"] = torch.zeros(4, 128, dtype=torch.uint8)
    obs["tokens"][1] = ord(" ")
    obs["tokens"][2] = torch.tensor(tokens("x" * 127 + "\N{TANGERINE}"))
    obs["tokens"][3] = torch.arange(128, 256)
    seen = policy.vlm_inputs(obs)["attention_mask"].sum(1)
    assert seen[0] == seen[1] == 2 * 2**2 + 2                     # images, begin, newline
    assert flow.ode_sample(policy, obs, 2).isfinite().all()


def test_images_fit_into_the_square_from_minus_one_to_one(folder):
    policy = make(folder)
    obs = {"state": torch.zeros(1, 6), "rgb": torch.full((1, 2, 3, 20, 40), 255, dtype=torch.uint8)}
    obs["rgb"][:, 1] = 0
    seen = policy.vlm_inputs(obs)["pixel_values"].float()                    # (1, 2, 3, 28, 28)
    assert seen.shape == (1, 2, 3, 28, 28)
    assert torch.allclose(seen[0, 0, :, :14], torch.ones(3, 14, 28), atol=1e-2)
    assert torch.allclose(seen[0, 0, :, 14:], -torch.ones(3, 14, 28))    # black below a wide one
    assert torch.allclose(seen[0, 1], -torch.ones(3, 28, 28))


# ------------------------------------------------------------------------------------------------
# The method on it


def recorded_batch(policy, rows=5):
    obs = observation(rows)
    x_0, path = sde.sde_sample(policy, obs, 4, 0.5)
    y = torch.tensor([1.0, -1.0]).repeat(rows)[:rows]
    return {**obs, **path._asdict(), "y": y, "mask": torch.ones(rows, 4),
            "k": torch.arange(4).expand(rows, -1)}


def gradients(policy, batch):
    """Of the loss of all four steps of each row, which share what `encode` gave."""
    ctx, loss = policy.encode(batch), 0
    for k in batch["k"].T:
        steps = nft.recorded_steps(policy, {**batch, "k": k}, ctx)
        x_next, _ = steps.pop("x_next"), steps.pop("x_0")
        v_theta, v_old = steps.pop("v_theta"), steps.pop("v_old")
        v_theta = credited(policy, v_theta, v_old)
        loss = loss + nft.step_nft_loss(v_theta, v_old, target=x_next, **steps)[0] / 4
    loss.backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def test_the_loss_reaches_the_expert_and_only_the_expert(folder):
    policy = make(folder)
    with torch.no_grad():
        batch = recorded_batch(policy)
    found = gradients(policy, batch)
    heads = ("embed_action_time", "action_out_proj", "model.dit")
    wanted = {name for name, _ in policy.model.named_parameters()
              if name.startswith(heads) and "embed_tokens" not in name}
    # the last layer's keys of the state and of the actions do reach the output
    assert {name.removeprefix("model.") for name in found} == wanted
    assert all(grad.abs().max() > 0 for grad in found.values())
    everything = gradients(make(folder, "all"), batch)
    assert any(".vlm." in name and grad.abs().max() > 0 for name, grad in everything.items())


def test_micro_batches_change_the_memory_and_not_the_gradient(folder):
    """All of it in 32 bits: the sums are the same but for their order."""
    with torch.no_grad():
        batch = recorded_batch(make(folder))
    whole, parts = (gradients(make(folder, "all", micro_batch=size), batch) for size in (100, 2))
    assert whole.keys() == parts.keys() and any(".vlm." in name for name in whole)
    for name in whole:
        assert torch.allclose(whole[name], parts[name], rtol=1e-3, atol=1e-6), name


def test_padded_dims_take_part_in_the_flow_and_earn_no_credit(folder):
    policy, obs = make(folder), observation(3)
    chunks = torch.rand(3, 4, 7) * 2 - 1
    x_0 = policy.normalise(chunks)
    assert x_0.shape == (3, 4, 8) and (x_0[..., 7] == 0).all()
    assert torch.allclose(policy.denormalise(x_0), chunks, atol=1e-5)
    v_theta, v_old = torch.ones(3, 4, 8), torch.zeros(3, 4, 8)
    assert credited(policy, v_theta, v_old)[..., 7].abs().max() == 0
    assert credited(policy, v_theta, v_old)[..., :7].min() == 1
    x_1 = noise(3)
    other = x_1.clone()
    other[..., 7] += 1
    moved = flow.ode_sample(policy, obs, 4, other) - flow.ode_sample(policy, obs, 4, x_1)
    assert moved[..., :7].abs().max() > 1e-4


def test_credit_asks_for_the_same_movement_as_of_the_small_policy(folder):
    """A normal dim: half of the way from its 1 % to its 99 % quantile is 2.33 deviations."""
    policy, small = make(folder), flow.FlowPolicy(4, 8, 6)
    torch.manual_seed(4)
    chunks = torch.randn(5000, 4, 7) * torch.linspace(0.02, 0.07, 7)
    obs = {"state": torch.randn(5000, 6)}
    policy.fit_normalisation(obs, chunks)
    small.fit_normalisation(obs, torch.nn.functional.pad(chunks, (0, 1)))
    v_theta, v_old = torch.ones(1, 4, 8), torch.zeros(1, 4, 8)
    credits = [credited(each, v_theta, v_old)[0, 0].tolist() for each in (policy, small)]
    assert credits[0] == credits[1] == [0, 0, 0, 1, 1, 1, 1, 0]  # from 0.1 / 2.33 = 0.043 on


def test_statistics_are_the_checkpoints_or_else_the_demonstrations(folder, tmp_path):
    obs, chunks = {"state": torch.randn(9, 6)}, torch.rand(9, 4, 7) * 2 - 1
    policy = pi0.PI0Policy(folder, **ROBOT)
    policy.fit_normalisation(obs, chunks)
    flat = chunks.flatten(0, 1)
    wanted = (flat[0] - flat.mean(0)) / flat.std(0)
    assert torch.allclose(policy.normalise(flat[None, :1])[0, 0, :7], wanted, atol=1e-4)
    shutil.copytree(folder, tmp_path / "own")
    (tmp_path / "own/processor_config.json").write_text(json.dumps(
        {"actions_mean": [0.5] * 7, "actions_std": [2.0] * 7}))
    policy = pi0.PI0Policy(tmp_path / "own", **ROBOT)
    policy.fit_normalisation(obs, chunks)                                # the state, nothing else
    assert torch.allclose(policy.normalise(chunks)[..., :7], (chunks - 0.5) / 2, atol=1e-5)
    state = policy.normalised_state(obs)
    assert torch.allclose(state[:, :6].mean(0), torch.zeros(6), atol=1e-4)
    assert torch.allclose(state[:, :6].std(0), torch.ones(6), atol=1e-2)


def test_a_copy_shares_what_is_frozen_and_a_checkpoint_leaves_it_out(folder, tmp_path):
    policy = make(folder)
    twin, obs, x_1 = copy.deepcopy(policy), observation(2), noise(2)
    for (name, a), b in zip(policy.named_parameters(), twin.parameters()):
        assert (a is b) == (not a.requires_grad) == pi0.is_frozen(name, "expert"), name
    assert torch.equal(flow.ode_sample(policy, obs, 4, x_1), flow.ode_sample(twin, obs, 4, x_1))
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p += 0.01
    nft.ema_update(twin, policy, 0.5)
    run.save(tmp_path / "last.pt", policy, SimpleNamespace(flags={}))
    content = torch.load(tmp_path / "last.pt", weights_only=True)["policy"]
    assert content and not [name for name in content if ".vlm." in name]
    again = load_policy(tmp_path / "last.pt")
    after = flow.ode_sample(policy, obs, 4, x_1)
    assert torch.equal(flow.ode_sample(again, obs, 4, x_1), after)
    between = flow.ode_sample(twin, obs, 4, x_1)
    assert not torch.allclose(between, after) and torch.isfinite(between).all()


def test_memory_is_counted_before_anything_is_loaded(folder):
    policy = make(folder)
    told = pi0.memory(policy.model.config, "expert", 3)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in policy.parameters() if not p.requires_grad)
    assert (told["trained"], told["frozen"]) == pytest.approx((24e-9 * trained, 2e-9 * frozen))
    (_, seen, layers), = policy.encode(observation(3))
    each = sum(z.numel() * z.element_size() for layer in layers for z in layer)
    # a table is counted for 48 tokens of text, here the longest sentence has fewer or more
    wanted = each / seen.shape[1] * (2 * 2**2 + 48) / 1e9
    assert told["kept"] == pytest.approx(wanted, rel=1e-6)


# ------------------------------------------------------------------------------------------------
# 04 with it


def test_a_wrong_folder_a_wrong_size_and_a_missing_tokenizer_are_one_line_each(folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, bare)
    for path, size, words in ((tmp_path / "none", 7, "none"), (ROOT / "tests", 7, "tests"),
                              (folder, 9, "8 of action"), (bare, 7, "AutoTokenizer")):
        with pytest.raises(SystemExit) as stopped:
            pi0.PI0Policy(path, horizon=4, action_dim=size, state_dim=6)
        line = str(stopped.value)
        assert f"--policy {path}" in line and words in line and "\n" not in line
    assert "--obs rgb" in wrong_call("04_train_libero.py", "--policy", folder)
    assert "--train" in wrong_call("04_train_libero.py", "--train", "some")
    assert "--policy" in wrong_call("04_train_libero.py", "--train", "all")
    assert "--micro-batch" in wrong_call("04_train_libero.py", "--micro-batch", "0")


def test_weights_that_are_missing_are_told_and_not_made_up(folder, tmp_path):
    from safetensors.torch import load_file, save_file
    shutil.copytree(folder, tmp_path / "part")
    weights = load_file(folder / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "action_out_proj" not in name},
              tmp_path / "part/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="2 weights of pi0 are missing there, .*action_out_proj"):
        pi0.PI0Policy(tmp_path / "part", **ROBOT)


def test_statistics_of_another_robot_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "own")
    (tmp_path / "own/processor_config.json").write_text(json.dumps(
        {"state_mean": [0.0] * 8, "state_std": [1.0] * 8}))
    with pytest.raises(SystemExit, match="state statistics have 8 numbers, the robot has 6"):
        pi0.PI0Policy(tmp_path / "own", **ROBOT)


@pytest.mark.sim
def test_sft_lowers_its_loss_on_rendered_demonstrations(folder, gl):  # noqa: F811
    world = libero.make_workers("libero_object", [0], 1, obs="rgb", demo_noise=0.2, max_steps=16,
                                image_size=48, gl=gl)
    _, rows = world.play(follow_expert, [libero.random_start(0, 3)])
    world.close()
    chunks = flow.sliding_chunks(rows["action"], 4)
    obs = {name: rows[name] for name in ("state", "rgb", "tokens")}
    policy = pi0.PI0Policy(folder, **ROBOT)
    policy.fit_normalisation(obs, chunks)

    def loss():
        with torch.no_grad():
            torch.manual_seed(0)
            return np.mean([flow.flow_matching_loss(policy, obs, policy.normalise(chunks)).item()
                            for _ in range(10)])

    before = loss()
    flow.train_sft(policy, obs, chunks, 60, lr=3e-3, batch_size=16)
    assert loss() < 0.8 * before


@pytest.mark.sim
def test_an_iteration_on_libero_images_and_one_more_resumed(folder, recorded, gl,  # noqa: F811
                                                            kept_simulators, tmp_path,  # noqa: F811
                                                            monkeypatch):
    flags = ("--obs rgb --image-size 48 --horizon 2 --sft-steps 3 --sft-batch 8 --episodes 8 "
             "--max-steps 8 --test-max-steps 8 --test-states 1 --test-episodes 1 --eval-episodes 1 "
             "--num-envs 1 --iterations").split()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    result, told = ran(*flags, 1, "--policy", folder, "--demos", recorded[0], "--out", "run")
    assert "stepnft" in result and "memory" in told
    first = torch.load(tmp_path / "run/last.pt", weights_only=True)
    ran("--resume", "--iterations", 2, "--out", "run")
    last = torch.load(tmp_path / "run/last.pt", weights_only=True)
    rows = (tmp_path / "run/log.csv").read_text().splitlines()
    assert len(rows) == 3 and last["state"]["iteration"] == 2
    for name in ("policy", "old"):
        assert first[name].keys() == last[name].keys()
        assert not [key for key in last[name] if ".vlm." in key]
    sft = torch.load(tmp_path / "run/sft.pt", weights_only=True)["policy"]
    assert any(not torch.equal(sft[key], first["policy"][key]) for key in sft)
