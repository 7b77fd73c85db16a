"""Every notebook runs top to bottom in a copy; the committed ones hold figures and no errors."""

import json
import subprocess
import sys

import pytest

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def figures(path):
    """How many images a notebook shows; no cell may have ended in an error."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(cell["execution_count"] for cell in cells), "a cell was never run"
    assert not any(output["output_type"] == "error" for output in outputs)
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_shows_here(path, tmp_path):
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", str(path),
               "--output-dir", str(tmp_path), "--ExecutePreprocessor.timeout=120"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert figures(tmp_path / path.name) == figures(path) >= 3
    assert path.stat().st_size < 500_000


def test_notebooks_define_no_maths():
    """They import from the scripts: no class, no network, no formula of the method's own."""
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        assert '"01_flow_policy"' in code and '"03_step_loss"' in code
        assert not any(word in code for word in ("class ", "nn.Linear", "softplus", "sigma**2"))
