"""results/gpu/run.py: small and on the CPU; its watch, and what it says when something fails."""

import importlib
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import conftest  # noqa: F401  (the way to the scripts)
from conftest import run_main
from envs import libero

gpu, common = map(importlib.import_module, ("results.gpu.run", "results.common"))


def tiny(folder, *parts):
    """-> {part: {what: value}}; every number has been printed, too."""
    code, out, err = run_main("results/gpu/run.py", "--tiny", "--out", folder, "--only", *parts)
    assert code is None and f"RESULT parts={len(parts)} failed=none" in out, err
    tables = {}
    for part in parts:
        rows = common.read(folder / f"{part}.csv")
        tables[part] = {row["what"]: float(row["value"]) for row in rows}
        assert len(tables[part]) == len(rows) and all("no GPU" in row["hardware"] for row in rows)
        assert all(f"{part}: {what} = " in out for what in tables[part])
    return tables


def test_without_a_gpu_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run_main("results/gpu/run.py", "--out", tmp_path / "none")
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and "--tiny" in err
    assert not (tmp_path / "none").exists()


def test_pi0_and_parity_small(tmp_path):
    tables = tiny(tmp_path, "pi0", "parity")
    pi0 = tables["pi0"]
    assert pi0["parameters, billions"] == pytest.approx(0.00026, abs=1e-5)
    assert pi0["update, --epochs 3, seconds"] > 0 and pi0["update, --epochs 1, seconds"] > 0
    assert set(tables["parity"].values()) == {0.0}                # the CPU against itself


def test_the_full_pi0_is_the_published_one():
    """Its config alone: as many parameters as pi0 has, and the memory of results/pi0."""
    from transformers import PI0Config, PI0ForConditionalGeneration
    with gpu.random_weights(PI0Config(), "meta"):
        model, told = PI0ForConditionalGeneration.from_pretrained("nowhere")
    assert 3.2e9 < sum(p.numel() for p in model.parameters()) < 3.9e9
    assert {p.device.type for p in model.parameters()} == {"meta"} and not any(told.values())
    wanted, _ = common.read(common.ROOT / "results/pi0/memory.csv")
    computed = sum(gpu.pi0.memory(PI0Config(), "expert", gpu.FULL.minibatch).values())
    assert computed == pytest.approx(float(wanted["total"]), abs=0.05)


def test_the_epochs_of_an_update_encode_again(monkeypatch):
    """Two minibatches an epoch: 2 and 6 passes of the frozen part, and 2 for its own time."""
    passes, policy = [], importlib.import_module("policies.pi0").PI0Policy
    encode = policy.encode
    monkeypatch.setattr(policy, "encode", lambda self, obs: (
        passes.append(len(obs["state"])), encode(self, obs))[1])
    during = {}
    for what, _ in gpu.pi0_update(gpu.TINY):
        during[what], passes[:] = list(passes), []
    assert during["4 chunks sampled, seconds"] == [4]
    assert during["images and sentences of 4 chunks alone, seconds"] == [2] * 2
    assert during["update, --epochs 1, seconds"] == [2] * 2
    assert during["update, --epochs 3, seconds"] == [2] * 6


def test_parity_tells_a_difference(monkeypatch):
    update, calls = gpu.nft.update, []

    def other(policy, *rest, **more):
        update(policy, *rest, **more)
        calls.append(torch.backends.cuda.matmul.allow_tf32)
        with torch.no_grad():
            next(policy.parameters()).add_(0.001 * len(calls))

    before = torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setattr(gpu.nft, "update", other)
    assert [value for _, value in gpu.parity(gpu.TINY)] == pytest.approx([0.001, 0.002], abs=1e-6)
    assert calls[1:] == [False, True] and torch.backends.cuda.matmul.allow_tf32 == before


def test_a_watch_sees_seconds_cores_and_gpu(monkeypatch):
    samples = iter([(0.2, 3.0), None, (0.6, 5.0)])
    monkeypatch.setattr(gpu, "gpu_now", lambda: next(samples, None))
    for name, value in (("is_available", True), ("reset_peak_memory_stats", None),
                        ("synchronize", None), ("max_memory_allocated", 7e9)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    with gpu.Watch() as watch:
        end, start = time.process_time() + 0.5, time.perf_counter()
        while time.process_time() < end:
            pass
        time.sleep(max(0, start + 1.8 - time.perf_counter()))
    rows = dict(watch.rows("work"))
    assert rows["work, seconds"] >= 1.8 and rows["work, GB of tensors at the peak"] == 7
    assert 0.4 < rows["work, share of the cores that is busy"] * common.cores() * watch.seconds
    assert rows["work, share of the time in which the GPU computes"] == pytest.approx(0.4)
    assert rows["work, GB in use on the GPU, simulators included"] == 5


@pytest.mark.parametrize("answer, wanted", [("37, 2048\n", (0.37, 2.147483648)), ("[N/A], 5", None),
                                            (OSError("no nvidia-smi"), None)])
def test_nvidia_smi_is_read_or_left_out(monkeypatch, answer, wanted):
    def ask(command, **_):
        assert "--id=GPU-12-34" in command
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(
        uuid="12-34"))
    monkeypatch.setattr(gpu.subprocess, "check_output", ask)
    assert gpu.gpu_now() == wanted


def test_a_part_that_fails_is_told_and_the_others_go_on(monkeypatch, tmp_path):
    def fails(size):
        yield "this", 1
        raise SystemExit("no simulator\nat all")

    monkeypatch.setitem(gpu.PARTS, "libero", fails)
    monkeypatch.setitem(gpu.PARTS, "pi0", lambda size: iter([("that", 2)]))
    flags = "--tiny", "--out", tmp_path, "--only"
    code, out, err = run_main("results/gpu/run.py", *flags, "libero", "pi0")
    assert code == 1 and "RESULT parts=1 failed=libero" in out
    assert err.strip() == "libero failed, SystemExit: no simulator"
    assert [row["what"] for row in common.read(tmp_path / "libero.csv")] == ["this"]
    assert [row["value"] for row in common.read(tmp_path / "pi0.csv")] == ["2.0"]
    code, out, _ = run_main("results/gpu/run.py", *flags, "libero")
    assert "at all" in code and "RESULT" not in out


@pytest.mark.sim
def test_scenes_small(tmp_path):
    found = tiny(tmp_path, "maniskill")["maniskill"]
    assert found["the expert's success"] == 1 and found["episodes a second"] > 0
    assert {value for what, value in found.items() if "one seed in three" in what} == {0}
    assert "mani_skill" in sys.modules


@pytest.mark.sim
def test_libero_with_images_small(tmp_path):
    try:
        libero.find_gl()
    except SystemExit as missing:
        pytest.skip(str(missing))
    found = tiny(tmp_path, "libero")["libero"]
    steps = found["rollout, control steps a second"] * found["rollout, seconds"]
    assert 0 < round(steps) <= 2 * 8 and found["update, seconds"] > 0
    assert 0.5 < found["GB of main memory of a simulator"] < 3
