"""tools/flags.py with a script of its own: one line for what cannot work, flags that come back from
a checkpoint, and clones that fit."""

import contextlib
import io
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import conftest  # noqa: F401  (the way to the tools)
from policies.small import RobotPolicy
from tools import flags, run


def script(prog="my_script.py", **defaults):
    """A parser as 04 and 05 have it, with a flag of its own."""
    parser = flags.Parser("My script.\n\nIt does much.")
    parser.prog = prog
    parser.add_argument("--tasks", type=flags.natural, nargs="+", default=[0])
    flags.add_method_flags(parser)
    flags.add_run_flags(parser, envs_per_core=2, **defaults)
    return parser


def outcome(call, *inputs):
    """-> (what the call returns, None), or (None, the one line with which it stops)."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            return call(*inputs), None
        except SystemExit as stopped:
            line, = err.getvalue().splitlines()
            assert stopped.code == 2 and line.startswith("my_script.py: ")
            return None, line


def told(call, *inputs):
    """The line of a call that must not go through."""
    result, line = outcome(call, *inputs)
    assert line is not None, f"the call went through: {result}"
    return line


def parse(*argv):
    """The flags of a call that must go through."""
    args, line = outcome(flags.parse_run, script(), [str(word) for word in argv])
    assert line is None, line
    return args


def refused(*argv):
    return told(flags.parse_run, script(), [str(word) for word in argv])


# ------------------------------------------------------------------------------------------------
# The parser


def test_an_error_is_one_line_and_no_usage():
    assert told(script().error, "--x 3: no") == "my_script.py: --x 3: no"
    assert "--tasks" in told(script().parse_args, ["--tasks", "x"])
    assert "--task" in told(script().parse_args, ["--task", "3"])     # flags are not shortened


def test_help_begins_with_the_first_paragraph_and_tells_defaults():
    text = script().format_help()
    assert "My script." in text and "It does much." not in text and "(default: 0.5)" in text


PEEKS = [([], None), (["--seed", "3"], None), (["--task", "Push"], "Push"),
         (["--task=Push"], "Push"), (["--seed", "x", "--task", "Push", "--more"], "Push"),
         (["--tas", "Push"], None), (["--task", "Push", "--help"], "Push")]


def check_peek(argv, value):
    assert script().peek("--task", argv) == value


@pytest.mark.parametrize("argv, value", PEEKS)
def test_one_flag_can_be_read_before_all_are(argv, value, capsys):
    check_peek(argv, value)
    assert capsys.readouterr() == ("", "")


def test_a_flag_that_is_not_used_is_refused_if_it_was_given():
    parser = script(demo_noise=0.3)
    args = parser.parse_args(["--seed", "3", "--demo-noise", "0.3"])
    assert outcome(parser.refuse, args, ["demo_noise", "max_steps"], "no") == (None, None)
    args = parser.parse_args(["--demo-noise", "0.1"])
    assert told(parser.refuse, args, ["max_steps", "demo_noise"], "is not used") == (
        "my_script.py: --demo-noise is not used")


def test_a_folder_that_cannot_be_made_is_told_with_its_flag(tmp_path):
    (tmp_path / "file").touch()
    line = told(script().make_folder, "--out", tmp_path / "file" / "new")
    assert "--out" in line and str(tmp_path / "file") in line
    assert script().make_folder("--out", tmp_path / "new" / "er") is None
    assert (tmp_path / "new" / "er").is_dir()


def test_a_folder_in_which_another_run_writes_is_told_with_its_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(flags.files, "lock", lambda path: False)
    assert f"--out {tmp_path}" in told(script().claim_folder, "--out", tmp_path)
    monkeypatch.setattr(flags.files, "lock", lambda path: True)
    assert script().claim_folder("--out", tmp_path / "new") is None
    assert (tmp_path / "new").is_dir()


def test_ctrl_c_ends_a_script_in_one_line(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        flags.call(main)
    out, err = capsys.readouterr()
    assert stopped.value.code == 130 and len(err.splitlines()) == 1 and "--resume" in err
    done = []
    flags.call(lambda: done.append(1))
    assert done == [1]


def test_numbers_that_are_used_everywhere():
    assert [flags.positive_int("1"), flags.natural("0"), flags.positive_float("1e-9")] == [
        1, 0, 1e-9]
    for check, text in ((flags.positive_int, "0"), (flags.natural, "-1"),
                        (flags.positive_float, "0"), (flags.positive_float, "nan")):
        with pytest.raises((flags.argparse.ArgumentTypeError, ValueError)):
            check(text)


@pytest.mark.parametrize("argv, words", [
    ("--episodes 12 --group-size 8", ["--episodes 12", "--group-size 8"]),
    ("--ema 0.9 0.1", ["--ema 0.9 0.1"])])
def test_numbers_that_contradict_each_other_are_one_line(argv, words):
    for line in (refused(*argv.split()),
                 told(flags.check_method, script(), script().parse_args(argv.split()))):
        assert all(word in line for word in words)
    assert parse(*"--episodes 16 --group-size 8 --ema 0.3 0.3".split()).ema == [0.3, 0.3]


@pytest.mark.parametrize("cores, free, ranks, wanted", [
    (8, 64, None, 16), (8, 64, "2", 8), (3, 64, "2", 3), (1, 64, "4", 1), (8, 7, None, 10),
    (8, 7, "2", 5)])
def test_the_ranks_of_a_machine_share_its_cores_and_its_memory(cores, free, ranks, wanted,
                                                               monkeypatch):
    """Two simulators a core if there are 0.7 GB for each; a rank without its own still has one."""
    monkeypatch.setattr(flags.os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    monkeypatch.setattr(flags.memory, "free", lambda: free)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert script().parse_args([]).num_envs == wanted


# ------------------------------------------------------------------------------------------------
# A new run, and one that comes back


@contextlib.contextmanager
def a_run(*argv, prog="my_script.py"):
    """The folder of a run with these flags that has saved its clone and an iteration."""
    with tempfile.TemporaryDirectory() as folder:
        out, policy = Path(folder) / "run", RobotPolicy(1, 1, 1, width=8)
        args = flags.parse_run(script(prog), [*argv, "--out", str(out)])
        out.mkdir()
        for name in ("sft.pt", "last.pt"):
            run.save(out / name, policy, args)
        (out / "log.csv").touch()
        yield out


def test_a_new_run_keeps_its_flags_as_numbers_and_words(tmp_path):
    args = parse("--seed", 3, "--out", tmp_path)
    assert args.resume is False and args.eval_only is None
    assert args.flags["script"] == "my_script.py" and args.flags["seed"] == 3
    assert args.flags["out"] == str(tmp_path)
    kept = set(vars(args)) - {"flags"}
    assert set(args.flags) == kept | {"script"} and args.flags["ema"] == args.ema


def test_a_folder_that_holds_a_run_is_not_written_over():
    with a_run() as out:
        assert f"--out {out}" in refused("--out", out)
        (out / "last.pt").unlink()
        assert parse("--out", out).out == out                  # a clone alone is no run


# what is trained with; all of it comes back
FLAGS = "--seed 3 --lr 1e-3 --episodes 16 --tasks 0 2 --num-envs 5 --test-episodes 7".split()


def check_resume():
    with a_run(*FLAGS, "--video", "2", "--device", "cpu") as out:
        args = parse("--resume", "--out", out)
        assert (args.seed, args.lr, args.episodes, args.tasks, args.num_envs,
                args.test_episodes) == (3, 1e-3, 16, [0, 2], 5, 7)
        assert args.resume == out / "last.pt" and args.out == out
        assert args.video == 0                                 # belongs to the call
        # the same again is no contradiction, and some may change
        args = parse("--resume", "--out", out, "--seed", 3, "--lr", 1e-3, "--iterations", 9,
                     "--num-envs", 2, "--test-episodes", 1, "--eval-every", 1,
                     "--eval-episodes", 2)
        assert (args.iterations, args.num_envs, args.test_episodes) == (9, 2, 1)
        for wrong in ("--seed 4", "--lr 1e-4", "--tasks 0", "--horizon 9", "--noise-level 0.1",
                      "--demo-noise 0", "--sft-steps 7", "--ema 0.1 0.2"):
            line = refused("--resume", "--out", out, *wrong.split())
            assert wrong.split()[0] in line and "leave the flag out" in line
        assert "--sft" in refused("--resume", "--out", out, "--sft", out / "sft.pt")


def test_a_resumed_run_has_the_flags_of_its_checkpoint():
    check_resume()


def check_eval_only():
    with a_run(*FLAGS, "--device", "cpu") as out:
        for name in ("last.pt", "sft.pt"):
            args = parse("--eval-only", out / name)
            assert (args.seed, args.lr, args.tasks, args.test_episodes) == (3, 1e-3, [0, 2], 7)
            assert args.eval_only == out / name and args.out == out and args.resume is False
            assert args.num_envs == script().get_default("num_envs")  # this machine's
        args = parse("--eval-only", out / "last.pt", "--out", out / "new", "--tasks", 2,
                     "--test-episodes", 3)
        assert (args.out, args.tasks, args.test_episodes) == (out / "new", [2], 3)
        for wrong in ("--seed 4", "--horizon 9"):
            assert wrong in refused("--eval-only", out / "last.pt", *wrong.split())


def test_a_policy_is_tested_with_the_flags_of_its_checkpoint():
    check_eval_only()


def test_a_run_without_all_its_files_is_not_resumed():
    for missing in ("last.pt", "sft.pt", "log.csv"):
        with a_run() as out:
            (out / missing).unlink()
            line = refused("--resume", "--out", out)
            assert "--resume" in line and missing in line
    with a_run() as out:
        (out / "last.pt").write_bytes(b"half")
        assert "--resume" in refused("--resume", "--out", out)


def test_a_checkpoint_of_another_script_is_refused():
    with a_run(prog="other.py") as out:
        for call in (("--resume", "--out", out), ("--eval-only", out / "last.pt")):
            assert "other.py" in refused(*call)


def test_what_is_no_checkpoint_is_told_by_the_parser(tmp_path):
    whole = {"config": {"kind": "robot"}, "policy": {}, "flags": {}}
    for name in whole:
        torch.save({k: v for k, v in whole.items() if k != name}, tmp_path / f"no_{name}.pt")
    torch.save({**whole, "config": {}}, tmp_path / "no_kind.pt")
    torch.save(whole, tmp_path / "whole.pt")
    (tmp_path / "text.pt").write_text("text")
    for name in ("no_config", "no_policy", "no_flags", "no_kind", "text"):
        line = refused("--sft", tmp_path / f"{name}.pt")
        assert "--sft" in line and "is not a checkpoint" in line
    assert "no such file" in refused("--eval-only", tmp_path / "nothing.pt")
    assert flags.checkpoint(str(tmp_path / "whole.pt")) == tmp_path / "whole.pt"


@pytest.mark.parametrize("argv, words", [
    ("--episodes 24 --group-size 8", ["--episodes 24", "16"]),
    ("--test-episodes 1", ["--test-episodes"]), ("--eval-episodes 1", ["--eval-episodes"])])
def test_ranks_that_cannot_share_are_one_line(argv, words, monkeypatch):
    parse(*argv.split())
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused(*argv.split())
    assert all(word in line for word in words)
    parse("--test-episodes", 2, "--eval-episodes", 2, "--episodes", 16, "--group-size", 8)


# ------------------------------------------------------------------------------------------------
# Clones


def check_clones():
    with a_run() as out:
        needed, parser = RobotPolicy(1, 1, 1, width=8).config, script()
        args = SimpleNamespace(sft=out / "sft.pt")
        flags.check_clone(parser, args, needed)
        flags.check_clone(parser, args, dict(reversed(needed.items())))
        others = [{**needed, name: 7} for name in needed]
        others += [{k: v for k, v in needed.items() if k != name} for name in needed]
        others += [{**needed, "slots": 3}]
        for other in others:
            line = told(flags.check_clone, parser, args, other)
            assert f"--sft {out / 'sft.pt'}" in line and str(needed) in line and str(other) in line
        flags.check_clone(parser, SimpleNamespace(sft=None), {})


def test_a_clone_must_be_of_exactly_the_kind_that_is_trained():
    check_clones()
