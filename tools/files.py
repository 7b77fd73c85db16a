"""Files that are whole or not there, and folders that are one run's."""

import atexit
import os
from pathlib import Path

HELD = {}   # folder -> its lock, open as long as this process lives


def make_folder(path):
    """Makes it if need be; SystemExit in one line if it cannot be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise SystemExit(f"{path}: this folder cannot be made or written ({error.strerror}); give "
                         "another --out, or call from another folder") from None
    return path


def lock(path):
    """Claims a folder until this process ends -> whether it was free. Under torchrun rank 0 claims
    it for all. The system drops a lock with its process: one of a dead process is no lock."""
    path = Path(path).resolve()
    if path in HELD or os.environ.get("RANK", "0") != "0":
        return True
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    file = open(path / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return False
    HELD[path] = file
    atexit.register((path / ".lock").unlink, missing_ok=True)
    return True


def save(content, path):
    """torch.save, the whole file or none; SystemExit in one line if there is no room for it."""
    import torch  # not at the top: a lock needs none of it
    path = Path(path)
    part = path.with_suffix(f".{os.getpid()}.tmp")  # two runs may train the same clone
    try:
        torch.save(content, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # of a full disk torch says "unexpected pos"
        part.unlink(missing_ok=True)
        told = "is the disk full?" if isinstance(error, RuntimeError) else error.strerror
        raise SystemExit(f"{path} could not be written ({told}); what stood there before is whole"
                         ) from None


def load(path):
    """The content of a file that `save` wrote; SystemExit in one line for a broken one."""
    import torch
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is something else
        told = str(error).split("\n")[0][:80]
        raise SystemExit(f"{path} is broken ({told}): delete it and call again") from None
