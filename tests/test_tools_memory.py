"""tools/memory.py on folders that look like /proc and /sys; and what the flags make of it."""

import math
import os

import pytest

import conftest  # noqa: F401  (the way to the tools)
from test_tools_flags import script
from tools import flags, memory

GB = 10**9


def machine(root, available, cgroup="0::/\n", **files):
    """A machine with so many GB available; files: numbers of its cgroups."""
    told = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:  {available * GB // 1024} kB\n",
            "proc/self/cgroup": cgroup, **files}
    for name, text in told.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    return root


def group(folder, limit, used, cached=0, names=("memory.max", "memory.current", "inactive_file")):
    """The files of a cgroup; limits in GB, or a word."""
    limit = limit if isinstance(limit, str) else int(limit * GB)
    stat = f"anon 5\n{names[2]} {int(cached * GB)}\n"
    return {f"{folder}/{names[0]}": f"{limit}\n", f"{folder}/{names[1]}": f"{int(used * GB)}\n",
            f"{folder}/memory.stat": stat}


V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
TOP, OLD = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.mark.parametrize("cgroup, files, wanted", [
    ("0::/\n", {}, 50),
    ("0::/\n", group(TOP, "max", 7), 50),                                     # no limit
    ("0::/\n", group(TOP, 16, 6), 10),                                        # a container's
    ("0::/\n", group(TOP, 16, 6, cached=4), 14),                              # files give way
    ("0::/\n", group(TOP, 16, 17), 0),
    ("0::/\n", group(TOP, 900, 6), 50),                                       # more than there is
    ("0::/slurm/job 7\n", group(f"{TOP}/slurm/job 7", 12, 2), 10),
    ("0::/slurm/job 7\n", group(f"{TOP}/slurm", 12, 3), 9),                   # of a folder above
    ("0::/docker/abc\n", group(TOP, 8, 1), 7),             # the path is that outside the container
    ("5:cpu:/a\n9:memory:/job\n", group(f"{OLD}/job", 20, 15, 1, V1), 6),
    ("5:cpu:/a\n9:memory:/job\n", group(f"{OLD}/a", 20, 15, 1, V1), 50),      # not its own
    ("9:memory:/\n0::/\n", group(OLD, 9223372036.854771712, 2, 0, V1), 50)])
def test_the_least_of_machine_container_and_job(tmp_path, cgroup, files, wanted):
    assert memory.free(machine(tmp_path, 50, cgroup, **files)) == pytest.approx(wanted, abs=0.01)


def test_where_nothing_tells_there_is_no_limit(tmp_path):
    assert memory.free(tmp_path) == math.inf


def test_this_machine_has_some():
    assert 0.05 < memory.free() < 1e5


@pytest.mark.parametrize("cores, free, ranks, wanted", [
    (4, 100, 1, 8), (4, 4.5, 1, 4), (4, 0.2, 1, 1), (4, math.inf, 1, 8), (4, 100, 2, 4),
    (4, 6, 3, 2), (1, 100, 2, 1)])
def test_as_many_simulators_as_cores_and_memory_bear(monkeypatch, cores, free, ranks, wanted):
    """Two a core, each of a gigabyte; several ranks share both."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(memory, "free", lambda: free)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    parser = script(gb_per_env=1.0)
    assert flags.parse_run(parser, []).num_envs == wanted


def test_a_line_tells_before_memory_ends_once_nothing_else_is_wrong(monkeypatch, capsys, tmp_path):
    """Until the folder is claimed another check may fail, whose line should stand alone."""
    monkeypatch.setattr(memory, "free", lambda: 10.0)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    parsers = []
    for count in ("12", "64"):
        parsers.append(script(gb_per_env=0.8))
        flags.parse_run(parsers[-1], ["--num-envs", count])
    assert capsys.readouterr().err == ""
    parsers[0].claim_folder("--out", tmp_path / "few")
    assert capsys.readouterr().err == ""
    parsers[1].claim_folder("--out", tmp_path / "many")
    line, = capsys.readouterr().err.splitlines()
    assert "--num-envs 64" in line and "51.2 GB" in line and "10.0" in line and "give 12" in line
