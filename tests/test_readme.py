"""The READMEs tell the truth: commands parse, flags and links exist, numbers are the csv's, and the
blocks of Python run."""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from conftest import ROOT

sys.path.insert(0, str(ROOT / "results"))
figures, robot, tables = map(importlib.import_module, ("figures", "04_train_libero", "tables"))
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in tables.PAGES}
README = PAGES["README.md"]
REPORTS = sorted(set(PAGES) - {"README.md", "results/benchmark_width/README.md"})
SCRIPTS = sorted(path.name for path in ROOT.glob("0*.py"))
OTHERS = [f"results/{name}.py" for name in (
    "ablations", "challenge", "exercises", "experts", "figures", "libero_failures", "mechanism",
    "notebooks", "pi0", "pixel_gap", "protocol")]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def code(text):
    """The shell blocks of a page, one command a line."""
    return re.sub(r"\\\n\s*", "", "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)))


def prose(text):
    return re.sub(r"```.*?```", "", text, flags=re.S)


def inline(text):
    """Inline code; one that is broken over two lines is one piece."""
    paragraphs = re.split(r"\n\n", prose(text))
    return [" ".join(piece.split()) for paragraph in paragraphs
            for piece in re.findall(r"`([^`]+)`", paragraph)]


CODE = "\n".join(map(code, PAGES.values()))
INLINE = [piece for text in PAGES.values() for piece in inline(text)]


class Parsed(Exception):
    """Carries what a script's parser made of its flags; nothing after that runs."""


@pytest.fixture
def parsed(monkeypatch):
    """parse(script, flags) -> namespace and parser, by the script's own main()."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        raise Parsed(parse_args(self, args, namespace), self)

    def parse(script, flags):
        folder, _, name = script.rpartition("/")
        monkeypatch.syspath_prepend(str(ROOT / folder))
        module = importlib.import_module(name.removesuffix(".py"))
        with monkeypatch.context() as patch, pytest.raises(Parsed) as raised:
            patch.setattr(robot, "checkpoint", Path)  # the pages' checkpoints are not here
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            patch.setattr(sys, "argv", [script, *flags])
            module.main()
        return raised.value.args

    return parse


def commands(pages=PAGES):
    """Every call of a script of this repo: whole lines of the blocks, and inline code."""
    for page in pages:
        lines = [part for line in code(PAGES[page]).split("\n") if not line.startswith("#")
                 for part in line.split("&&")]
        for line in lines + inline(PAGES[page]):
            found = re.search(r"(?:^|\s)((?:results/|tests/)?\w+\.py)(?=\s|$)(.*)", line)
            if found and found[1] in SCRIPTS + OTHERS:
                yield found[1], found[2]


def test_there_is_something_to_check():
    assert len(set(commands(["README.md"]))) >= 15
    assert {script for script, _ in commands(["README.md"])} >= set(SCRIPTS)
    assert len(set(commands())) >= 30 and len(REPORTS) == 9


@pytest.mark.parametrize("script, flags", sorted(set(commands())))
def test_a_command_parses(script, flags, parsed, capsys):
    # a capital S stands for a seed: `05_train_maniskill.py --seed S`
    namespace, _ = parsed(script, shlex.split(re.sub(r"--seed S\b", "--seed 0", flags)))
    assert namespace is not None


def test_a_wrong_flag_would_be_noticed(parsed, capsys):
    with pytest.raises(SystemExit) as told:
        parsed("03_step_loss.py", ["--no-such-flag"])
    assert told.value.code == 2


def test_flags_named_alone_exist(parsed):
    """`--target endpoint` in a sentence: some script has that flag."""
    parsers = [parsed(script, [])[1] for script in SCRIPTS]
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    named = [piece for piece in INLINE if piece.startswith("--")]
    assert len(named) > 20
    for piece in named:
        for flag in re.findall(r"--[a-z][a-z-]+", piece):
            assert flag in known | {"--nproc-per-node", "--help", "--record", "--phase"}, piece


@pytest.mark.parametrize("first", ["python3 -m venv", ".venv/bin/torchrun"])
def test_the_other_programs_flags_exist(first):
    """venv, pip and torchrun: the flags of the first two are few, torchrun has a parser to ask."""
    lines = [line for line in CODE.split("\n") if line.startswith(first)]
    assert lines
    for line in lines:
        if "torchrun" in first:
            from torch.distributed.run import get_args_parser
            options = shlex.split(line)[1:]
            get_args_parser().parse_args(options)
        else:
            assert "pip install -q -r requirements.txt &&" in line
            assert (ROOT / "requirements.txt").exists() and (ROOT / "tests").is_dir()


def test_the_two_commands_of_the_page_are_as_ci_wants_them():
    """CI runs the second one as it stands: it greps for a line of this form."""
    install = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && "
    lines = code(README).split("\n")
    for command in (".venv/bin/python 03_step_loss.py", ".venv/bin/python -m pytest -q tests"):
        assert lines.count(install + command) == 1


def links(page="README.md"):
    text = prose(PAGES[page])
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return sorted({link for link in found if not link.startswith("http")})


def test_there_are_links_and_pictures():
    assert sum(link.endswith(".png") for link in links()) >= 8
    assert sum(".py#L" in link for link in links()) >= 10


@pytest.mark.parametrize("page, link", [(page, link) for page in PAGES for link in links(page)])
def test_a_link_leads_somewhere(page, link):
    path, _, anchor = link.partition("#")
    if path:
        assert (ROOT / page).parent.joinpath(path).exists()
    else:
        titles = re.findall(r"^#+ (.*)$", prose(PAGES[page]), re.M)
        slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert anchor in slugs, slugs


def test_a_linked_function_stands_on_the_linked_line():
    found = [(page, *link) for page, text in PAGES.items()
             for link in re.findall(tables.LINK, text)]
    assert len(found) >= 15 and {page for page, *_ in found} > {"README.md"}
    for page, name, path, line in found:
        lines = (ROOT / page).parent.joinpath(path).read_text().split("\n")
        assert re.match(rf"\s*(def|class) {name.split('.')[-1]}\b", lines[int(line) - 1]), (
            f"{page}: {name} is not on line {line} of {path}: run results/tables.py")


def test_functions_named_in_the_exercises_exist():
    """In the exercises a function is named with its file: `mirror` (03)."""
    named = re.findall(r"`([\w.]+)` \((0\d|envs/\w+\.py)\)", README)
    assert len(named) >= 12
    for name, where in named:
        path, = ROOT.glob(where if where.endswith(".py") else f"{where}_*.py")
        assert tables.defined_at(path, name)


def test_the_page_is_a_page_and_reports_have_their_headings():
    assert README.count("\n") <= 300
    for page in REPORTS:
        titles = re.findall(r"^## (.*)$", prose(PAGES[page]), re.M)
        assert titles[:3] == ["What was run", "What came out", "What it does not show"], page


@pytest.mark.parametrize("page", PAGES)
def test_every_row_of_a_table_has_as_many_cells_as_its_head(page):
    for block in re.findall(r"(?:^\|.*\n)+", prose(PAGES[page]), re.M):
        cells = {line.count("|") for line in block.strip().split("\n")}
        assert len(cells) == 1, block


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_csv(page):
    assert tables.refresh(PAGES[page], (ROOT / page).parent) == PAGES[page], "run results/tables.py"


def test_result_numbers_by_hand():
    """The same once more, without that script's formatting: SFT and after, row by row."""
    for folder, page in (("03_step_loss", "results/03_step_loss/README.md"),
                         ("05_train_maniskill", "results/05_train_maniskill/README.md")):
        for row in tables.read(ROOT / f"results/{folder}/summary.csv"):
            script, flags = row["command"].split(" ", 1)
            section = PAGES[page].split(f"<!-- table: results/{folder}/summary.csv")[1]
            section = section.split(f"| `{script}` with |")[1].split("\n\n")[0]
            line, = [text for text in section.split("\n") if text.startswith(f"| `{flags}` |")]
            cells = [part.split()[0] for part in line.split("|")[2:5]]
            sft, after = float(row["sft"]), float(row["stepnft"])
            assert [float(part) for part in cells] == pytest.approx(
                [sft, after, round(100 * (after - sft), 1)])


def test_the_mean_of_the_toy_by_hand():
    rows = tables.read(ROOT / "results/03_step_loss/summary.csv")
    line = re.search(rf"\| mean of {len(rows)} \|.*", README)[0]
    cells = [float(part) for part in line.split("|")[2:4]]
    assert cells == pytest.approx([np.mean([float(row[name]) for row in rows])
                                   for name in ("sft", "stepnft")], abs=6e-4)


def ends(path, **entries):
    """Success by seed, of the rows of a csv in results/ablations with these entries."""
    return {row["seed"]: float(row["after"]) for row in tables.read(
        ROOT / f"results/ablations/{path}.csv") if entries.items() <= row.items()}


def less(after, before):
    return {seed: after[seed] - before[seed] for seed in after}


def told(gains, seeds=8):
    """{seed: gain} -> as a page has it, in points: the mean with scipy's interval."""
    gains = list(gains.values())
    low, high = stats.ttest_1samp(gains, 0).confidence_interval()
    assert len(gains) == seeds
    return f"{100 * np.mean(gains):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def test_the_title_by_hand():
    report = PAGES["results/ablations/README.md"]
    toy, _ = [text for text in report.split("\n") if text.startswith("| next step - endpoint")]
    for noise in ("0.1", "0.5"):                                       # the other is PickCube's
        found = told(less(*(ends("phase", target=target, noise_level=noise)
                            for target in ("next", "endpoint"))))
        assert found.replace(", ", ",&nbsp;") in toy
    assert found in README


def test_centred_labels_by_hand():
    """The next step's lead with them, by how much it shrinks beside the untuned and the tuned arms,
    the tuned endpoint's lift, and all twelve seeds of labels-grouped and of noise-0.5."""
    report = PAGES["results/ablations/README.md"]
    for noise in ("0.5", "0.2"):
        one, group, tuned = ({target: ends(path, target=target, noise_level=noise, **size)
                              for target in ("next", "endpoint")} for path, size in (
            ("centred", {"group_size": "1"}), ("centred", {"group_size": "8"}), ("phase", {})))
        lead = [less(arm["next"], arm["endpoint"]) for arm in (group, one, tuned)]
        assert told(lead[0]) in report
        assert told(less(lead[1], lead[0])) in report and told(less(lead[2], lead[0])) in report
        assert noise == "0.2" or told(less(group["endpoint"], tuned["endpoint"])) in report
    twelve = {name: ends("ablations", variant=name) | ends("ablations_tuning", variant=name, lr=lr)
              for name, lr in (("default", "0.001"), ("noise-0.5", "0.001"),
                               ("labels-grouped", "0.0003"))}
    for name in ("noise-0.5", "labels-grouped"):
        assert told(less(twelve[name], twelve["default"]), 12) in report


def test_a_changed_number_would_be_noticed():
    number = re.search(r"\| 0\.\d{3} ", README)[0]
    assert tables.refresh(README.replace(number, "| 0.999 ", 1)) == README


def test_a_changed_line_number_would_be_noticed():
    page = "results/04_train_libero/README.md"
    moved = re.sub(r"\.py#L\d+", ".py#L1", PAGES[page])
    assert moved != PAGES[page] == tables.refresh(moved, (ROOT / page).parent)


def test_the_readme_cites_no_file_that_is_missing():
    for piece in INLINE:
        if piece.startswith("results/"):
            assert list(ROOT.glob(piece.split()[0])), piece
    for page in REPORTS:  # a report names the files beside it
        for piece in inline(PAGES[page]):
            if re.fullmatch(r"[\w*.]+\.(csv|png|npz)", piece) and piece not in (
                    "log.csv", "test.csv"):
                assert list((ROOT / page).parent.glob(piece)), (page, piece)


def test_one_command_draws_every_figure_of_the_readme(tmp_path, monkeypatch, capsys):
    drawn = {(ROOT / page).parent.joinpath(link).resolve() for page in PAGES for link in links(page)
             if "figures/" in link and link.endswith(".png")}
    monkeypatch.setattr(figures, "DRAWN", tmp_path)
    monkeypatch.setattr(sys, "argv", ["figures.py"])
    figures.main()
    assert drawn and {path.name for path in drawn} <= {path.name for path in tmp_path.glob("*.png")}
    assert all(path.exists() for path in drawn)


# ------------------------------------------------------------------------------------------------
# The blocks of Python: they run as they stand


def test_the_block_that_loads_a_policy_runs(tmp_path, monkeypatch):
    block, _ = PYTHON
    policy = robot.RobotPolicy(2, 7, state_dim=18, width=8)
    monkeypatch.chdir(tmp_path)
    Path("runs/04_train_libero").mkdir(parents=True)
    robot.save(Path("runs/04_train_libero/last.pt"), policy, argparse.Namespace(flags={}))
    names = {}
    exec(block, names)
    assert names["actions"].shape == (1, 2, 7) and names["x_0"].shape == (1, 2, 7)
    torch.testing.assert_close(names["policy"].state_dict(), policy.state_dict())


def test_the_block_that_brings_a_world_trains_in_it(tmp_path, monkeypatch, capsys):
    """Two processes, two short iterations: each may play any episode, and the log says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", "my_world.py --num-envs 2 --iterations 2 --episodes 16 "
                        "--sft-steps 30 --eval-every 2 --eval-episodes 8".split())
    names = {"__name__": "__main__"}
    try:
        exec(PYTHON[1], names)
    finally:
        if "world" in names:
            names["world"].close()
    log = tables.read("runs/my_world/log.csv")
    assert [row["episodes"] for row in log] == ["16", "32"]
    assert Path("runs/my_world/last.pt").exists()
    assert all(0 < float(row["grad_norm"]) < 1e3 for row in log)
    demos = names["demos"]
    assert demos["chunk"].shape == (len(demos["episode"]), 4, 2)
    assert set(demos["episode"].tolist()) == {0, 1, 2}
    started = names["Reach"]()
    for seed in (5, 6, 5):
        started.reset(seed)
    assert np.array_equal(started.observe()["state"],  # a seed is an episode, whatever came before
                          np.random.default_rng(5).uniform(-1, 1, 2).astype(np.float32))


def test_a_missing_table_is_skipped_with_a_line(tmp_path, capsys):
    figures.phase(tmp_path)
    assert "skipped phase" in capsys.readouterr().out
