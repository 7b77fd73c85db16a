"""results/benchmark/run.py: updates are whole, ratios are those of their parts."""

import importlib
import sys

import pytest

import conftest  # noqa: F401  (the way to the scripts)

benchmark, common = map(importlib.import_module, ("results.benchmark.run", "results.common"))


def test_the_settings_are_05s_defaults(tmp_path):
    """But for one pass and one minibatch size, which the page tells."""
    theirs = benchmark.critics.parse_args(["--out", str(tmp_path)])
    for name, value in vars(benchmark.update_args()).items():
        if name not in ("epochs", "device"):
            assert getattr(theirs, name) == value, name


def test_every_update_moves_the_policy_and_is_timed(monkeypatch):
    moved, pick = [], benchmark.pick_policy

    def watched():
        policy = pick()
        moved.append((policy, [p.clone() for p in policy.parameters()]))
        return policy

    monkeypatch.setattr(benchmark, "pick_policy", watched)
    rows = benchmark.compare_updates(chunks=64, repeats=1)
    (policy, before), = moved
    assert any((a != b).any() for a, b in zip(policy.parameters(), before))
    assert [row["update"] for row in rows] == ["pi-StepNFT, one step of a chunk",
                                               "PPO, one step of a chunk",
                                               "pi-StepNFT, all 4 steps"]
    assert all(row["ms"] > 0 and row["mib"] > 0 for row in rows)
    assert rows[2]["mib"] > rows[0]["mib"]          # four times as many steps at a time


def test_peak_memory_counts_what_is_held_at_a_time():
    def work():
        import torch
        for _ in range(3):
            torch.ones(2**20)                       # 4 MiB, and freed

    assert benchmark.peak_memory(work) == pytest.approx(2**22, rel=0.01)


@pytest.mark.sim
def test_both_simulators_beside_a_bare_loop(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "LIBERO_STEPS", 8)
    monkeypatch.setattr(benchmark, "MANISKILL_STEPS", 4)
    monkeypatch.setattr(sys, "argv", ["run.py", "--num-envs", "1", "--episodes", "1", "--out",
                                      str(tmp_path)])
    monkeypatch.setattr(benchmark, "compare_updates", lambda: [{"update": "none"}])
    benchmark.main()
    rows = common.read(tmp_path / "simulators.csv")
    assert [row["simulator"].split(",")[0] for row in rows] == ["LIBERO", "ManiSkill"]
    for row in rows:
        ratio = int(row["rollout"]) / int(row["bare"])
        assert float(row["ratio"]) == pytest.approx(ratio, rel=0.05) and float(row["busy"]) > 0
