"""README.md tells the truth: commands parse, flags and links exist, numbers are the csv's."""

import argparse
import importlib
import re
import shlex
import sys

import numpy as np
import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "results"))
figures, tables = map(importlib.import_module, ("figures", "tables"))
README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(path.name for path in ROOT.glob("0*.py"))
CODE = re.sub(r"\\\n\s*", "", "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)))
PROSE = re.sub(r"```.*?```", "", README, flags=re.S)
INLINE = re.findall(r"`([^`\n]+)`", PROSE)


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
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            patch.setattr(sys, "argv", [script, *flags])
            module.main()
        return raised.value.args

    return parse


def commands():
    """Every call of a script of this repo: whole lines of the blocks, and inline code."""
    lines = [part for line in CODE.split("\n") if not line.startswith("#")
             for part in line.split("&&")]
    for line in lines + INLINE:
        found = re.search(r"(?:^|\s)((?:results/|tests/)?\w+\.py)(?=\s|$)(.*)", line)
        if found and found[1] in SCRIPTS + ["results/figures.py", "results/notebooks.py"]:
            yield found[1], found[2]


def test_there_is_something_to_check():
    assert len(set(commands())) >= 15 and {script for script, _ in commands()} >= set(SCRIPTS)


@pytest.mark.parametrize("script, flags", sorted(set(commands())))
def test_a_command_parses(script, flags, parsed, capsys):
    namespace, _ = parsed(script, shlex.split(flags))
    assert namespace is not None


def test_a_wrong_flag_would_be_noticed(parsed, capsys):
    with pytest.raises(SystemExit):
        parsed("03_step_loss.py", ["--no-such-flag"])


def test_flags_named_alone_exist(parsed):
    """`--labels grouped` in a sentence: some script has that flag, and takes that value."""
    parsers = [parsed(script, [])[1] for script in SCRIPTS]
    named = [code for code in INLINE if code.startswith("--")]
    assert len(named) > 20
    for code in named:
        for flag in re.findall(r"--[a-z][a-z-]+", code):
            assert any(flag in p._option_string_actions for p in parsers) or (
                flag in ("--nproc-per-node", "--help", "--record")), code


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


def links():
    found = re.findall(r"\]\(([^)\s]+)\)", PROSE) + re.findall(r'(?:src|href)="([^"]+)"', PROSE)
    return sorted({link for link in found if not link.startswith("http")})


def test_there_are_links_and_pictures():
    assert sum(link.endswith(".png") for link in links()) >= 8
    assert sum(".py#L" in link for link in links()) >= 10


@pytest.mark.parametrize("link", links())
def test_a_link_leads_somewhere(link):
    path, _, anchor = link.partition("#")
    if path:
        assert (ROOT / path).exists()
    else:
        titles = re.findall(r"^#+ (.*)$", PROSE, re.M)
        slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert anchor in slugs, slugs


def test_a_linked_function_stands_on_the_linked_line():
    found = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(found) >= 15
    for name, path, line in found:
        lines = (ROOT / path).read_text().split("\n")
        assert re.match(rf"\s*(def|class) {name.split('.')[-1]}\b", lines[int(line) - 1]), (
            f"{name} is not on line {line} of {path}: run results/tables.py")


def test_functions_named_in_the_exercises_exist():
    """In the exercises a function is named with its file: `mirror` (03)."""
    named = re.findall(r"`([\w.]+)` \((0\d)\)", README)
    assert len(named) >= 12
    for name, number in named:
        path = next(ROOT.glob(f"{number}_*.py"))
        assert tables.defined_at(path, name)


def test_tables_are_those_of_the_csv():
    assert tables.refresh(README) == README, "run results/tables.py"


def test_result_numbers_by_hand():
    """The same once more, without that script's formatting: SFT and after, row by row."""
    for folder in ("03_step_loss", "05_train_maniskill"):
        for row in tables.read(ROOT / f"results/{folder}/summary.csv"):
            script, flags = row["command"].split(" ", 1)
            section = README.split(f"| `{script}` with |")[1].split("\n\n")[0]
            line, = [text for text in section.split("\n") if text.startswith(f"| `{flags}` |")]
            cells = [part.split()[0] for part in line.split("|")[2:5]]
            sft, after = float(row["sft"]), float(row["stepnft"])
            assert [float(part) for part in cells] == pytest.approx(
                [sft, after, round(100 * (after - sft), 1)])


def test_a_changed_number_would_be_noticed():
    number = re.search(r"\| 0\.\d{3} ", README)[0]
    assert tables.refresh(README.replace(number, "| 0.999 ", 1)) == README


def test_the_readme_cites_no_file_that_is_missing():
    for code in INLINE:
        if code.startswith("results/"):
            assert list(ROOT.glob(code.split()[0])), code


def test_one_command_draws_every_figure_of_the_readme(tmp_path, monkeypatch, capsys):
    drawn = {link for link in links() if link.startswith("results/figures/")}
    monkeypatch.setattr(figures, "DRAWN", tmp_path)
    monkeypatch.setattr(sys, "argv", ["figures.py"])
    figures.main()
    assert drawn and drawn <= {f"results/figures/{path.name}" for path in tmp_path.glob("*.png")}
    assert all((ROOT / link).exists() for link in drawn)


def test_the_ood_bars_average_over_variants_and_axes(tmp_path, monkeypatch, capsys):
    rates = {"in-distribution": (0.9,), "vision": (0.8, 0.6), "semantic": (0.5,),
             "execution": (0.2, 0.3, 0.4)}
    lines = ["policy,seed,axis,variant,episodes,success,low,high"]
    for policy, lift in (("SFT", 0.0), ("PPO", 0.02), ("pi-StepNFT", 0.05)):
        lines += [f"{policy},{seed},{axis},v{i},100,{rate + lift},{rate - 0.1},{rate + 0.1}"
                  for seed in (0, 1) for axis, values in rates.items()
                  for i, rate in enumerate(values)]
    (tmp_path / "ood.csv").write_text("\n".join(lines))
    rows = {(row[0], row[1], row[2]): row[3:] for row in figures.ood_rows(tmp_path / "ood.csv")}
    for axis, values in rates.items():
        mean, low, high = rows[axis, "1", "pi-StepNFT"]
        assert mean == pytest.approx(np.mean(values) + 0.05) and low < mean < high
    assert rows["OOD mean", "0", "SFT"][0] == pytest.approx((0.7 + 0.5 + 0.3) / 3)
    monkeypatch.setattr(figures, "DRAWN", tmp_path)
    figures.ood(tmp_path / "ood.csv")
    assert (tmp_path / "ood.png").stat().st_size > 10_000


def test_a_missing_table_is_skipped_with_a_line(tmp_path, capsys):
    figures.ood(tmp_path / "ood.csv")
    assert "skipped ood" in capsys.readouterr().out
