"""policies/pi0_files.py: folders as lerobot, transformers and others leave them. A checkpoint's own
statistics are used or it is told that they are not; what is missing is named before weights are
loaded."""

import importlib
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import wrong_call
from policies import build_policy, load_policy, pi0, pi0_files
from tools import run

study = importlib.import_module("results.pi0.run")
SIZES = {"state": 6, "action": 7}
CONFIG = dict(kind="pi0", horizon=4, action_dim=7, state_dim=6, train="expert", tokenizer=None)
PRE = "policy_preprocessor_step_5_normalizer_processor.safetensors"
POST = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("pi0")
    study.make_tiny(path, pixels=28, patch=14)
    return path


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(tiny, tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def bare(folder):
    """A folder without a tokenizer, as lerobot's are."""
    for name in TOKENIZER:
        (folder / name).unlink(missing_ok=True)
    return folder


def tensors(state=6, action=7, **more):
    """Statistics as lerobot keeps them, all of them, and of things that are no policy's matter."""
    torch.manual_seed(0)
    found = {"timestamp.mean": torch.zeros(1), "observation.images.top.mean": torch.zeros(3, 1, 1)}
    for key, size in (("observation.state", state), ("action", action)):
        for name in ("mean", "std", "min", "max", "q01", "q99"):
            found[f"{key}.{name}"] = torch.rand(size) + 0.1
    return {**found, **more}


def pipeline(folder, side, modes=None, file=True):
    """policy_preprocessor.json or policy_postprocessor.json."""
    step, name = ("normalizer", PRE) if side == "pre" else ("unnormalizer", POST)
    modes = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD", **(modes or {})}
    steps = [{"registry_name": "device_processor", "config": {"device": "cpu"}},
             {"registry_name": f"{step}_processor", "config": {"norm_map": modes}}]
    if file:
        steps[1]["state_file"] = name
    (folder / f"policy_{side}processor.json").write_text(json.dumps({"steps": steps}))


def told(folder):
    known, line = pi0_files.statistics(folder, SIZES)
    assert "\n" not in line and line.startswith("statistics: state from ")
    return known, line


def refused(function, *args, **more):
    with pytest.raises(SystemExit) as stopped:
        function(*args, **more)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


# ------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize("pipelines", [True, False])
def test_lerobots_statistics_are_the_policys(folder, pipelines):
    """With pipelines that name the files, and found by their names alone."""
    found = tensors()
    save_file(found, folder / PRE)
    save_file({**found, "action.mean": found["action.mean"] + 1}, folder / POST)
    for side in ("pre", "post") * pipelines:
        pipeline(folder, side)
    known, line = told(folder)
    assert line == f"statistics: state from {POST}, action from {POST}"
    policy = build_policy({**CONFIG, "folder": str(folder)})
    obs, chunks = {"state": torch.randn(9, 6)}, torch.rand(9, 4, 7)
    policy.fit_normalisation(obs, chunks)                          # changes nothing
    mean, std = found["action.mean"] + 1, found["action.std"]      # the postprocessor's
    assert torch.allclose(policy.normalise(chunks)[..., :7], (chunks - mean) / std, atol=1e-4)
    acted = policy.denormalise(torch.nn.functional.pad(torch.full((1, 4, 7), 0.1), (0, 1)))
    assert torch.allclose(acted[0], (mean + 0.1 * std).clamp(-1, 1).expand(4, 7), atol=1e-4)
    wanted = (obs["state"] - found["observation.state.mean"]) / found["observation.state.std"]
    state = policy.normalised_state(obs)[:, :6]
    assert torch.allclose(state, wanted.clamp(-5, 5), atol=1e-3)


def test_the_preprocessors_alone_serve(folder):
    save_file(tensors(), folder / PRE)
    known, line = told(folder)
    assert set(known) == {"state", "action"} and line.count(PRE) == 2 and "not read" not in line


def test_the_file_that_a_pipeline_names_is_read_and_no_other(folder):
    (folder / PRE).write_bytes(b"of an older run")
    save_file(tensors(), folder / PRE.replace("5", "7"))
    pipeline(folder, "pre")
    text = (folder / "policy_preprocessor.json").read_text().replace("step_5", "step_7")
    (folder / "policy_preprocessor.json").write_text(text)
    assert "step_7" in told(folder)[1]


def test_transformers_processor_comes_first(folder):
    save_file(tensors(), folder / PRE)
    (folder / "processor_config.json").write_text(json.dumps(
        {"actions_mean": [0.5] * 7, "actions_std": [2.0] * 7}))
    known, line = told(folder)
    assert line == f"statistics: state from {PRE}, action from processor_config.json"
    assert known["action"][0].tolist() == [0.5] * 7


@pytest.mark.parametrize("mode", ["QUANTILES", "QUANTILE10", "MIN_MAX", "IDENTITY"])
def test_what_was_scaled_otherwise_is_told_and_not_read(folder, mode):
    save_file(tensors(), folder / PRE)
    pipeline(folder, "pre", {"ACTION": mode})
    known, line = told(folder)
    assert set(known) == {"state"}
    assert line == (f"statistics: state from {PRE}, action from the demonstrations; not read: "
                    f"action by {mode} in {PRE}")


@pytest.mark.parametrize("found, words, known", [
    (tensors(state=8), ["state of 8 numbers, the robot has 6"], {"action"}),
    (tensors(action=32), ["action of 32 numbers, the robot has 7"], {"state"}),
    (tensors(**{"action.std": torch.full((7,), torch.inf)}), ["action without a finite"],
     {"state"}),
    ({name: values for name, values in tensors().items() if name != "action.mean"},
     ["action without a finite mean"], {"state"}),
    ({"so100.buffer.action.mean": torch.zeros(7), "so100.buffer.action.std": torch.ones(7)},
     ["so100.buffer.action"], set())])
def test_what_cannot_be_read_is_told(folder, found, words, known):
    save_file(found, folder / PRE)
    read, line = told(folder)
    assert set(read) == known and "not read: " in line and PRE in line
    assert all(word in line for word in words), line
    assert "timestamp" not in line and "image" not in line


def test_statistics_of_others_are_told(folder):
    (folder / "assets/libero").mkdir(parents=True)
    (folder / "assets/libero/norm_stats.json").write_text("{}")                # openpi's
    weights = load_file(folder / "model.safetensors")
    weights["normalize_inputs.buffer_observation_state.mean"] = torch.zeros(6)  # older lerobot's
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    known, line = told(folder)
    assert known == {} and line.endswith("; not read: assets/libero/norm_stats.json; not read: "
                                         "those among the weights in model.safetensors")


def test_without_any_the_demonstrations_give_them(folder):
    assert told(folder) == ({}, "statistics: state from the demonstrations, action from the "
                                "demonstrations")


@pytest.mark.parametrize("name", [PRE, "policy_preprocessor.json", "processor_config.json"])
def test_a_broken_file_is_named(folder, name):
    (folder / name).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    line = refused(pi0_files.statistics, folder, SIZES)
    assert str(folder / name) in line and "fetch it again" in line


def test_statistics_of_a_name_on_the_hub(folder, tmp_path, monkeypatch):
    """As the hub's client keeps what it has fetched; it is not asked."""
    from huggingface_hub import constants
    save_file(tensors(), folder / PRE)
    pipeline(folder, "pre")
    place = tmp_path / "hub/models--lerobot--pi0_tiny"
    shutil.copytree(folder, place / "snapshots/0123")
    (place / "refs").mkdir()
    (place / "refs/main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    known, line = told("lerobot/pi0_tiny")
    assert set(known) == {"state", "action"} and line.count(PRE) == 2


# ------------------------------------------------------------------------------------------------
# The tokenizer


def test_a_missing_tokenizer_is_named_before_any_weight_is_loaded(bare, monkeypatch):
    (bare / "model.safetensors").unlink()
    config = {**CONFIG, "folder": str(bare)}
    for call in (lambda: pi0.tell_ahead(config, 8), lambda: build_policy(config)):
        line = refused(call)
        assert line.startswith(f"--policy {bare}:") and "give --tokenizer" in line
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = wrong_call("04_train_libero.py", "--policy", bare, "--obs", "rgb")
    assert "--tokenizer" in line and str(bare) in line


def test_another_tokenizer_is_the_policys_and_its_checkpoints(bare, tiny, tmp_path):
    policy = pi0.PI0Policy(bare, 4, 7, 6, tokenizer=tiny)
    assert policy.config["tokenizer"] == str(tiny)
    own = pi0.PI0Policy(tiny, 4, 7, 6)
    assert own.config["tokenizer"] is None
    assert policy.tokenizer("the soup")["input_ids"] == own.tokenizer("the soup")["input_ids"]
    run.save(tmp_path / "sft.pt", policy, type("Args", (), {"flags": {}}))
    again = load_policy(tmp_path / "sft.pt")
    assert again.config == policy.config
    content = torch.load(tmp_path / "sft.pt", weights_only=True)    # written before there was one
    del content["config"]["tokenizer"]
    content["config"]["folder"] = str(tiny)
    torch.save(content, tmp_path / "old.pt")
    assert load_policy(tmp_path / "old.pt").config["tokenizer"] is None


@pytest.mark.parametrize("spoil", ["no <bos>", "too many words", "nothing"])
def test_a_tokenizer_that_is_not_paligemmas_is_refused(bare, tiny, tmp_path, spoil):
    other = tmp_path / "other"
    other.mkdir()
    if spoil != "nothing":
        for name in TOKENIZER:
            if (tiny / name).exists():
                shutil.copy(tiny / name, other)
        config = json.loads((other / "tokenizer_config.json").read_text())
        words = (other / "tokenizer.json").read_text()
        if spoil == "no <bos>":
            config.pop("bos_token", None)
            words = words.replace("<bos>", "<other>")
        else:
            words = re.sub(r'("p": ?)\d+', r"\g<1>999999", words)
        (other / "tokenizer_config.json").write_text(json.dumps(config))
        (other / "tokenizer.json").write_text(words)
        if (other / "special_tokens_map.json").exists():
            (other / "special_tokens_map.json").unlink()
    line = refused(pi0_files.look, {**CONFIG, "folder": str(bare), "tokenizer": str(other)})
    assert f"--tokenizer {other}" in line


def test_flags_of_pi0_without_it_are_refused():
    line = wrong_call("04_train_libero.py", "--tokenizer", "a_file")
    assert "--tokenizer" in line and "--policy" in line


# ------------------------------------------------------------------------------------------------
# What is told ahead


def test_memory_and_statistics_are_told_ahead(folder, capsys):
    save_file(tensors(), folder / PRE)
    pi0.tell_ahead({**CONFIG, "folder": str(folder)}, rows=8)
    memory, statistics = capsys.readouterr().out.splitlines()
    assert "GB" in memory and statistics == f"statistics: state from {PRE}, action from {PRE}"


@pytest.mark.parametrize("content", [b"half of it", b""])
def test_broken_weights_are_one_line(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    line = refused(pi0.PI0Policy, folder, 4, 7, 6)
    assert str(folder / "model.safetensors") in line and "fetch it again" in line
