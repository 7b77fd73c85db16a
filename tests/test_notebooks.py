"""Every notebook runs top to bottom in a copy; the committed ones hold figures and no errors, and
are made of questions, short cells, pictures and a sentence on each."""

import ast
import json
import re

import pytest

from conftest import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path):
    """[(markdown or code, its text, does it show an image)]; none may have ended in an error."""
    told = []
    for cell in json.loads(path.read_text())["cells"]:
        outputs = cell.get("outputs", [])
        assert not any(output["output_type"] == "error" for output in outputs)
        assert cell["cell_type"] == "markdown" or cell["execution_count"], "a cell was never run"
        draws = any("image/png" in output.get("data", {}) for output in outputs)
        told.append((cell["cell_type"], "".join(cell["source"]), draws))
    return told


def test_there_are_three():
    assert len(NOTEBOOKS) == 3


@pytest.mark.sim
@each
def test_a_notebook_runs_and_shows_what_it_shows_here(path, tmp_path, monkeypatch):
    import nbformat                            # takes a second: not at the top
    from nbclient import NotebookClient
    # beside busy simulators, threads on nets this small wait for each other, for minutes
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": FOLDER}}).execute()
    nbformat.write(notebook, tmp_path / path.name)
    assert cells(tmp_path / path.name) == cells(path)
    assert sum(draws for *_, draws in cells(path)) >= 3
    assert path.stat().st_size < 500_000


@each
def test_a_step_is_a_question_a_short_cell_a_picture_and_a_sentence(path):
    told = cells(path)
    assert told[0][0] == told[-1][0] == "markdown" and "# Exercises" in told[-1][1]
    for i, (kind, text, draws) in enumerate(told):
        if kind == "code":
            lines = [line for line in text.splitlines() if line.strip()]
            assert len(lines) <= 8, f"{len(lines)} lines: {lines[0]}"
            assert all(len(line) <= 100 for line in lines), text
        if draws:
            (before, question, _), (after, seen, _) = told[i - 1], told[i + 1]
            assert before == after == "markdown", f"a picture without words: {text}"
            assert re.match(r"## .+\?$", question, re.M), f"not a question: {question}"
            assert not seen.startswith("#") and seen.rstrip().endswith("."), f"no sentence: {seen}"


@each
def test_links_lead_somewhere(path):
    words = "\n".join(text for kind, text, _ in cells(path) if kind == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", words)
    assert links and all((FOLDER / link).exists() for link in links), links


@each
def test_a_notebook_defines_no_maths(path):
    """They import from the scripts: no class, no network, no formula of the method's own."""
    code = "\n".join(text for kind, text, _ in cells(path) if kind == "code")
    if path.stem != "benchmark_width":  # which draws recordings
        assert '"01_flow_policy"' in code and '"02_sde_sampler"' in code
    assert not any(word in code for word in ("class ", "nn.Linear", "softplus", "sigma**2", "sqrt"))


def test_drawing_draws_and_does_nothing_else():
    tree = ast.parse((FOLDER / "drawing.py").read_text())
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                for name in node.names}
    assert imported == {"matplotlib.pyplot", "numpy"}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))
