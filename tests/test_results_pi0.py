"""results/pi0/run.py: its loop against 05's; the curve, tiny; memory and time. (The policy itself:
test_policies_pi0.)"""

import importlib
import sys

import pytest
import torch

import conftest  # noqa: F401  (the way to the scripts)
from envs.pixel_gap import PixelGap
from policies import load_policy
from policies.small import SmallImagePolicy

pi0, common = map(importlib.import_module, ("results.pi0.run", "results.common"))


def test_its_loop_is_that_of_05(tmp_path, monkeypatch, capsys):
    """With 05's own small policy in the place of pi0: the policy that 05 saves, to the last bit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(pi0.critics.pixel_gap.RUN, "sft_steps", 50)
    rest = ("--task PixelGap --seed 3 --transitions all --iterations 3 --episodes 16 --eval-every "
            "2 --eval-episodes 8 --test-episodes 8 --device cpu").split()
    monkeypatch.setattr(sys, "argv", ["05_train_maniskill.py", *rest, "--out", "theirs"])
    pi0.critics.main()
    monkeypatch.setattr(pi0.pi0, "PI0Policy", lambda folder, horizon, action_dim, state_dim, train,
                        micro_batch: SmallImagePolicy(horizon, action_dim, state_dim, cameras=1,
                                                      width=128))
    args, seen = pi0.critics.parse_args([*rest, "--out", "mine"]), []
    cloned = pi0.clone(args, "unused")
    pi0.train(args, cloned, PixelGap(), lambda *row: seen.append(row))
    assert [iteration for iteration, _ in seen] == [0, 2, 3] and seen[0][1] is cloned
    for file, (_, policy) in (("sft", seen[0]), ("last", seen[2])):
        theirs = load_policy(f"theirs/{file}.pt")
        assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), theirs.parameters()))


def main_in(folder, monkeypatch, *flags):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, flags), "--out", "out"])
    pi0.main()


def test_the_curve_tiny_and_again(tmp_path, monkeypatch, capsys):
    flags = ("--seeds 1 --iterations 2 --episodes 8 --sft-steps 5 --test-episodes 9").split()
    main_in(tmp_path, monkeypatch, *flags)
    first, last = common.read("out/curve.csv")
    assert (first["iteration"], last["iteration"]) == ("0", "2")
    row, = common.read("out/summary.csv")
    assert (row["sft"], row["after"], row["test_episodes"]) == (
        first["success"], last["success"], "9")
    monkeypatch.setattr(pi0, "run", None)                                 # all of it is there
    main_in(tmp_path, monkeypatch, *flags)
    assert capsys.readouterr().out.count("RESULT seeds=1") == 2


def test_the_memory_of_the_full_model_is_that_of_its_page(tmp_path, monkeypatch, capsys):
    main_in(tmp_path, monkeypatch, "--memory")
    mine, kept = (common.read(path) for path in ("out/memory.csv",
                                                 common.ROOT / "results/pi0/memory.csv"))
    assert [row["train"] for row in mine] == ["expert", "all"]
    for row, other in zip(mine, kept, strict=True):
        parts = [float(row[name]) for name in ("frozen", "trained", "kept")]
        assert float(row["total"]) == pytest.approx(sum(parts), abs=1e-3)
        assert {name: float(row[name]) for name in ("frozen", "trained", "kept")} == pytest.approx(
            {name: float(other[name]) for name in ("frozen", "trained", "kept")}, abs=0.05)


def test_the_tiny_model_is_as_small_as_its_page_says(tmp_path):
    pi0.make_tiny(tmp_path / "pi0")
    policy = pi0.pi0.PI0Policy(str(tmp_path / "pi0"), 4, 2, 2, "all", micro_batch=8)
    count = sum(p.numel() for p in policy.parameters()) / 1e6
    assert f"a π0 of {count:.2f} million" in (common.ROOT / "results/pi0/README.md").read_text()
