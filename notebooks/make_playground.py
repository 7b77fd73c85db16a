"""Writes playground.html, the exploration width under one's fingers: one file, no network.

Two policies are in it, the copy of 01 and what 03 made of it, and the sampler and the loss in plain
JavaScript. Whoever has a browser can drag the start, the noise and the number of steps, and see
what the robot tries.

Run:     python 03_step_loss.py                    (once: it saves the policy after RL)
         python notebooks/make_playground.py
Saves:   notebooks/playground.html, from playground/{template.html, method.js, page.js}: the page,
         the method with the names of the Python, and what is drawn of it.
"""

import argparse
import base64
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parent
PARTS = FOLDER / "playground"
sys.path.insert(0, str(FOLDER.parent))
flow = importlib.import_module("01_flow_policy")


def embed(policies):
    """{"before": policy, "after": policy} -> their weights as json; each tensor is its shape and
    its float32 numbers in base64."""
    weights = {}
    for when, policy in policies.items():
        weights[when] = {}
        for name, tensor in policy.state_dict().items():
            numbers = tensor.numpy().astype("<f4").tobytes()
            weights[when][name] = {"shape": list(tensor.shape),
                                   "float32": base64.b64encode(numbers).decode()}
    return json.dumps(weights)


def policies_in(html):
    """The way back: {"before": policy, "after": policy}, from the text of a playground."""
    pattern = r'<script type="application/json" id="weights">(.*?)</script>'
    policies = {}
    for when, weights in json.loads(re.search(pattern, html, re.S)[1]).items():
        policies[when] = flow.FlowPolicy(horizon=4, action_dim=2, state_dim=3)
        state = {}
        for name, tensor in weights.items():
            numbers = np.frombuffer(base64.b64decode(tensor["float32"]), "<f4")
            state[name] = torch.from_numpy(numbers.reshape(tensor["shape"]).copy())
        policies[when].load_state_dict(state)
    return policies


def page(policies):
    """The whole page: the template, with the two scripts and the weights in their places."""
    html = (PARTS / "template.html").read_text()
    for name, text in (("method.js", (PARTS / "method.js").read_text()),
                       ("page.js", (PARTS / "page.js").read_text()),
                       ("weights", embed(policies))):
        place = f"/* {name} */"
        assert html.count(place) == 1, f"the template has {html.count(place)} places for {name}"
        html = html.replace(place, text)
    return html


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--policy", type=Path, default="runs/03_step_loss/policy.pt",
                        help="the policy after RL, of 03 at its defaults")
    parser.add_argument("--out", type=Path, default=FOLDER / "playground.html")
    args = parser.parse_args()
    after = flow.FlowPolicy(horizon=4, action_dim=2, state_dim=3)
    try:
        after.load_state_dict(torch.load(args.policy, weights_only=True))
    except Exception:  # torch raises many kinds for a file that is something else
        parser.error(f"--policy {args.policy} is no checkpoint of 03: run 03_step_loss.py first")
    args.out.write_text(page({"before": flow.toy_policy(0), "after": after}))
    print(f"{args.out}: {args.out.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
