"""What a pi0's folder, or name on the hub, holds: network, tokenizer, statistics.

    network, tokenizer, known, told = look(config)      all that may be wrong, before weights load

Statistics: a pretrained policy knows its own units; what it does not know, the demonstrations give.
transformers keeps mean and deviation in processor_config.json, lerobot in tensors beside its two
pipelines:

    policy_preprocessor.json    policy_preprocessor_step_5_normalizer_processor.safetensors
    policy_postprocessor.json   policy_postprocessor_step_0_unnormalizer_processor.safetensors

Statistics that are there and of another kind are not read, and `told`, a line, says so.
"""

import contextlib
import json
from pathlib import Path

import torch

MOVED = "if a checkpoint names this folder, call from where it was trained"
PALIGEMMA = "give --tokenizer google/paligemma-3b-pt-224, or a folder that holds it"


def load(folder, what, flag="--policy", remedy=MOVED):
    """from_pretrained of a class of transformers; SystemExit in one line if it fails."""
    try:
        import transformers
        from safetensors import SafetensorError
    except ImportError as error:
        raise SystemExit(f"--policy: no transformers ({error}): pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if what != "PI0ForConditionalGeneration":
            return getattr(transformers, what).from_pretrained(folder)
        model, told = transformers.PI0ForConditionalGeneration.from_pretrained(
            folder, output_loading_info=True)
        lost = [*told["missing_keys"], *told["mismatched_keys"]]
        if lost:  # they would be random
            raise SystemExit(f"--policy {folder}: {len(lost)} weights of pi0 are missing there, "
                             f"{lost[0]} for one; give a checkpoint of transformers' pi0")
        return model
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError,
            SafetensorError) as error:
        told = str(error).split("\n")[0][:150]
        raise SystemExit(f"{flag} {folder}: no {what} of pi0 there ({told}); {remedy}") from None


def look(config):
    """config: that of a PI0Policy -> (PI0Config, tokenizer, {"state": (mean, std), "action": ...}
    or less, a line about these). SystemExit in one line if the policy cannot be made of them."""
    folder, sizes = config["folder"], {name: config[f"{name}_dim"] for name in ("state", "action")}
    network = load(folder, "PI0Config")
    if network.max_action_dim < sizes["action"] or network.max_state_dim < sizes["state"]:
        raise SystemExit(f"--policy {folder}: this pi0 has room for {network.max_state_dim} "
                         f"numbers of state and {network.max_action_dim} of action, the robot "
                         f"has {sizes['state']} and {sizes['action']}")
    tokenizer = load_tokenizer(folder, config["tokenizer"], network.vlm_config.text_config)
    return network, tokenizer, *statistics(folder, sizes)


def load_tokenizer(folder, other, text_config):
    """The folder's own tokenizer, or the one in `other`: lerobot's checkpoints have none."""
    if other:
        tokenizer = load(other, "AutoTokenizer", "--tokenizer")
    else:
        tokenizer = load(folder, "AutoTokenizer", remedy=f"pi0's is PaliGemma's: {PALIGEMMA}")
    words = [tokenizer.bos_token_id]
    words += tokenizer("pick it up\n", add_special_tokens=False)["input_ids"]
    if None in words or max(words) >= text_config.vocab_size:
        raise SystemExit(f"--tokenizer {other or folder}: that is not PaliGemma's, it has no <bos> "
                         f"or words that pi0 does not know; {PALIGEMMA}")
    return tokenizer


def find(folder, name):
    """The path of a file in a folder or on the hub, or None."""
    from transformers.utils import cached_file
    path = cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
    return path and Path(path)


@contextlib.contextmanager
def readable(path):
    """SystemExit in one line if what is done with a file here fails."""
    try:
        yield
    except Exception as error:  # safetensors has a kind of its own
        told = " ".join(str(error).split())[:100]
        raise SystemExit(f"--policy: {path} is broken ({told}): fetch it again") from None


def content(path):
    """Of a json file or of a file of tensors."""
    from safetensors.torch import load_file
    with readable(path):
        return load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())


def statistics(folder, sizes):
    """sizes: how many numbers the robot has of each -> ({"state": (mean, std), "action": ...} or
    less, a line that says where they are from and which are there and not read)."""
    known, origin, unread = {}, {}, []
    path = find(folder, "processor_config.json")
    own = content(path) if path else {}
    for name, its in (("state", "state"), ("action", "actions")):
        if own.get(f"{its}_mean") is None:
            continue
        known[name] = torch.tensor(own[f"{its}_mean"]), torch.tensor(own[f"{its}_std"])
        origin[name], count = path.name, len(known[name][0])
        if count != sizes[name]:
            raise SystemExit(f"--policy {folder}: its {name} statistics have {count} numbers, the "
                             f"robot has {sizes[name]}; take them out of processor_config.json, "
                             "then the demonstrations give them")
    for path, modes in lerobot_files(folder):
        tensors = content(path)
        for name in [each for each in sizes if each not in origin]:
            pair, problem = lerobot_pair(name, tensors, modes, sizes[name])
            if pair:
                known[name] = pair
            if pair or problem:
                origin[name] = path.name if pair else "the demonstrations"
            unread += [f"{problem} in {path.name}"] * bool(problem)
        unread += [f"{key} in {path.name}" for key in of_data_sets(tensors)]
    unread += foreign(find(folder, "config.json").parent)
    told = ", ".join(f"{name} from {origin.get(name, 'the demonstrations')}" for name in sizes)
    return known, f"statistics: {told}" + "; not read: ".join(["", *unread])


# ------------------------------------------------------------------------------------------------
# lerobot's files


LEROBOT = {"state": ("observation.state", "STATE"), "action": ("action", "ACTION")}


def lerobot_files(folder):
    """-> [(path of the tensors, how they are applied: {"ACTION": "MEAN_STD", ...}), ...]. The
    postprocessor's come first: by them the policy's own actions were scaled back."""
    found, root = [], find(folder, "config.json").parent
    for side, step in (("post", "unnormalizer"), ("pre", "normalizer")):
        pipeline = find(folder, f"policy_{side}processor.json")
        steps = content(pipeline).get("steps", []) if pipeline else []
        steps = [each for each in steps if each.get("registry_name") == f"{step}_processor"]
        named = [each["state_file"] for each in steps if each.get("state_file")]
        files = [path for name in named if (path := find(folder, name))]
        if not files:
            pattern = f"policy_{side}processor_step_*_{step}_processor.safetensors"
            files = sorted(root.glob(pattern))
        modes = steps[0].get("config", {}).get("norm_map", {}) if steps else {}
        found += [(path, modes) for path in files]
    return found


def lerobot_pair(name, tensors, modes, size):
    """-> ((mean, std) or None, what is there and cannot be read or None)."""
    key, kind = LEROBOT[name]
    if not any(each.startswith(f"{key}.") for each in tensors):
        return None, None
    mode, pair = modes.get(kind, "MEAN_STD"), [tensors.get(f"{key}.{of}") for of in ("mean", "std")]
    if mode != "MEAN_STD":
        return None, f"{name} by {mode}"
    if any(each is None or not each.isfinite().all() for each in pair):
        return None, f"{name} without a finite mean and std"
    mean, std = (each.flatten().float() for each in pair)
    if not len(mean) == len(std) == size:
        return None, f"{name} of {len(mean)} numbers, the robot has {size},"
    return (mean, std), None


def of_data_sets(tensors):
    """Statistics of one data set among several, "so100.buffer.action": which one is not known."""
    features = {each.rsplit(".", 1)[0] for each in tensors}
    ours = {key for key, _ in LEROBOT.values()}
    return sorted(each for each in features - ours if each.split(".")[-1] in ("state", "action"))


def foreign(root):
    """Statistics of openpi, of OpenVLA and of lerobot before it had pipelines, in a folder."""
    from safetensors import safe_open
    names = ("norm_stats.json", "dataset_statistics.json")
    found = [str(path.relative_to(root)) for name in names for path in sorted(root.rglob(name))]
    weights = root / "model.safetensors"
    if weights.exists():
        with readable(weights), safe_open(weights, "pt") as tensors:
            if any("normalize_" in name for name in tensors.keys()):
                found.append(f"those among the weights in {weights.name}")
    return found
