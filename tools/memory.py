"""How much memory a run may still take: the machine's, or that of its container or job."""

import math
from pathlib import Path

# A container's or job's limit is a cgroup's, of version 2 or 1: its name in /proc/self/cgroup, its
# folder, and what files there hold the limit, what is used, and which part of that are cached files
CGROUPS = {"": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
           "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                      "total_inactive_file")}


def free(root="/"):
    """Gigabytes that may still be taken before something is killed; infinite where nothing tells
    (macOS, Windows). root: "/", or in tests a folder that looks like it."""
    root = Path(root)
    left = [1024 * kilobytes for kilobytes in numbers(root / "proc/meminfo", "MemAvailable:")]
    for line in lines(root / "proc/self/cgroup"):
        _, name, path = line.split(":", 2)
        if name not in CGROUPS:
            continue
        folder, limit, used, cached = CGROUPS[name]
        # every folder above may set a limit, too; in a container the path may begin elsewhere
        for part in [Path(path), *Path(path).parents]:
            place = root / folder / str(part).lstrip("/")
            most, now = (lines(place / file) for file in (limit, used))
            if most and now and most[0] != "max":
                room = int(most[0]) - int(now[0])
                left.append(room + sum(numbers(place / "memory.stat", cached)))
    return max(0, min(left, default=math.inf)) / 1e9


def lines(path):
    """Of a file of the system; [] without it."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def numbers(path, name):
    """What stands behind this name in such a file."""
    return [int(line.split()[1]) for line in lines(path) if line.split()[0] == name]
