"""The pages tell the truth: commands parse, flags and links exist, numbers are the csv's, the block
of Python runs; and they stay short."""

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
from policies.small import RobotPolicy
from tools import flags as run_flags
from tools.run import save

figures, tables = map(importlib.import_module, ("results.figures", "results.tables"))
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in tables.PAGES}
README = PAGES["README.md"]
STUDIES = sorted(page for page in PAGES if re.match("results/.+/", page))
SCRIPTS = sorted(path.name for path in ROOT.glob("0*.py"))
OTHERS = sorted(str(path.relative_to(ROOT)) for folder in ("results/*", "course", "notebooks")
                for path in ROOT.glob(f"{folder}/*.py")) + ["results/figures.py"]


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


# what these programs must be called with; a page may name them without
NEEDS = {
    "results/benchmark_width/run.py": "maniskill --before sft.pt --after last.pt".split(),
    "results/experts/run.py": ["maniskill"], "results/libero_failures/run.py": ["last.pt"],
    "course/challenge.py": ["03_step_loss.py"], "course/assignment.py": ["grade", "copies/A"]}


@pytest.fixture
def parsed(monkeypatch):
    """parse(script, flags) -> namespace and parser, by the script's own main()."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        raise Parsed(parse_args(self, args, namespace), self)

    def parse(script, flags):
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        with monkeypatch.context() as patch, pytest.raises(Parsed) as raised:
            patch.setattr(run_flags, "checkpoint", Path)  # the pages' checkpoints are not here
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            patch.setattr(sys, "argv", [script, *flags])
            module.main()
        return raised.value.args

    return parse


CALL = r"(?:^|\s)((?:\w+/)*\w+\.py)(?=\s|$)(.*)"


def commands(pages=PAGES):
    """Every call of a script of this repo: whole lines of the blocks, and inline code."""
    for page in pages:
        lines = [part for line in code(PAGES[page]).split("\n") if not line.startswith("#")
                 for part in line.split("&&")]
        for line in lines + inline(PAGES[page]):
            found = re.search(CALL, line)
            if found and found[1] in SCRIPTS + OTHERS:
                yield found[1], found[2]


def test_there_is_something_to_check():
    assert {script for script, _ in commands(["README.md"])} >= set(SCRIPTS)
    assert len(set(commands())) >= 45 and len(STUDIES) >= 9
    assert {page for page in PAGES if "/" not in page.removeprefix("results/")} == {
        "README.md", "results/README.md", "results/NOTES.md"}
    assert {"course/README.md", "policies/README.md"} < set(PAGES)


@pytest.mark.parametrize("script, flags", sorted(set(commands())))
def test_a_command_parses(script, flags, parsed, capsys):
    # a capital S stands for a seed: `05_train_maniskill.py --seed S`
    given = shlex.split(re.sub(r"--seed S\b", "--seed 0", flags)) or NEEDS.get(script, [])
    namespace, _ = parsed(script, given)
    assert namespace is not None


@pytest.mark.parametrize("page", PAGES)
def test_a_program_of_a_command_exists(page):
    """Those of a folder, and all in the shell's blocks: from the repo's folder, as they are run."""
    called = re.findall(CALL, code(PAGES[page]), re.M)
    called += [found for piece in inline(PAGES[page]) for found in re.findall(CALL, piece)
               if "/" in found[0]]
    for program, _ in called:
        assert (ROOT / program).exists() or (ROOT / page).parent.joinpath(program).exists()


def test_a_wrong_flag_would_be_noticed(parsed, capsys):
    with pytest.raises(SystemExit) as told:
        parsed("03_step_loss.py", ["--no-such-flag"])
    assert told.value.code == 2


def test_flags_named_alone_exist(parsed):
    """`--target endpoint` in a sentence: some script has that flag."""
    programs = {script for script, _ in commands()} | set(SCRIPTS)
    parsers = [parsed(script, NEEDS.get(script, []))[1] for script in programs]
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    named = [piece for piece in INLINE if piece.startswith("--")]
    assert len(named) > 20
    for piece in named:
        for flag in re.findall(r"--[a-z][a-z-]+", piece):
            assert flag in known | {"--nproc-per-node"}, piece


def test_the_installing_programs_are_called_with_what_is_here():
    """venv and pip: their flags are few."""
    lines = [line for line in CODE.split("\n") if line.startswith("python3 -m venv")]
    assert lines
    for line in lines:
        assert "pip install -q -r requirements.txt &&" in line
        assert (ROOT / "requirements.txt").exists() and (ROOT / "tests").is_dir()


def test_torchruns_flags_exist(parsed):
    """On the pages and in the scripts' first lines: of torchrun, and of the script."""
    from torch.distributed.run import get_args_parser
    told = [CODE] + [(ROOT / script).read_text().split('"""')[1] for script in SCRIPTS]
    lines = [line for text in told for line in re.findall(r"torchrun (.*)", text)]
    assert lines
    for line in lines:
        options = get_args_parser().parse_args(shlex.split(line))
        assert parsed(options.training_script, options.training_script_args)[0]


def test_the_two_commands_of_the_page_are_as_ci_wants_them():
    """CI runs the second one as it stands: it greps for a line of this form."""
    install = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && "
    lines = code(README).split("\n")
    for command in (".venv/bin/python 03_step_loss.py",
                    ".venv/bin/python -m pytest -q -n 2 --dist loadfile tests"):
        assert lines.count(install + command) == 1


def links(page="README.md"):
    text = prose(PAGES[page])
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return sorted({link for link in found if not link.startswith("http")})


def test_there_are_links_and_pictures():
    assert sum(link.endswith(".png") for link in links()) >= 7
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
    named = re.findall(r"`([\w.]+)` \((0\d|envs/\w+\.py)\)", PAGES["course/README.md"])
    assert len(named) >= 12
    for name, where in named:
        path, = ROOT.glob(where if where.endswith(".py") else f"{where}_*.py")
        assert tables.defined_at(path, name)


# ------------------------------------------------------------------------------------------------
# Short pages, in the order in which a reader asks


def plain(text):
    """A page without its blocks of code, its tables and its comments."""
    return re.sub(r"^\|.*\n|<!--.*?-->\n?", "", prose(text), flags=re.M)


def paragraphs(text):
    """The paragraphs, list items and cells of a page, one string each; no equation, no tag."""
    text = re.sub(r"^\$\$.*\$\$$|<[^>]*>|!\[[^\]]*\]\([^)]*\)", "", plain(text), flags=re.M)
    text = re.sub(r"^(- |\d+\. )", r"\n\1", text, flags=re.M)
    return [part for part in re.split(r"\n\s*\n", text) if part.strip()]


def test_the_front_page_is_short():
    assert len(README.split()) <= 1300 and README.count("\n") <= 150
    assert len(paragraphs(README)) > 20
    for part in paragraphs(README):
        assert len(part.split()) <= 70, part
    for line in README.split("\n"):
        assert len(line) <= 400 or line.startswith("|"), line


def test_the_front_page_asks_in_the_readers_order():
    titles = re.findall(r"^## (.*)$", prose(README), re.M)
    assert titles == ["Try it", "The method", "Five steps", "The scripts", "Results",
                      "Wider space needs finer steps", "For courses", "Your own policy or world",
                      "Limits, and how to cite"]
    before = README.split("## Five steps")[0]
    for word in ("endpoint", "EMA", "residual"):
        assert not re.search(rf"\b{word}", before, re.I), word
    first = README.index("```bash")
    assert len(README[:first].split()) < 150  # the command comes early


def pseudocode():
    return re.search(r"## The method.*?```text\n(.*?)```", README, re.S)[1].strip("\n").split("\n")


def test_the_pseudocode_has_its_numbers():
    assert [int(line[:2]) for line in pseudocode()] == list(range(1, 13))
    assert all(len(line) <= 100 for line in pseudocode())


def test_the_same_numbers_stand_in_the_margins_of_02_and_03():
    def margin(script):
        return {int(n) for n in re.findall(r"\s# (\d+)\b", (ROOT / script).read_text())}

    assert margin("02_sde_sampler.py") >= {4, 5}
    assert margin("03_step_loss.py") >= {1, 2, 3, *range(6, 13)}


def test_what_the_first_command_prints_is_the_table_of_the_toy_world():
    printed = re.search(r"# RESULT sft=([\d.]+) stepnft=([\d.]+) episodes=(\d+)", README).groups()
    row, = [row for row in tables.read(ROOT / "results/toy/summary.csv")
            if row["command"] == "03_step_loss.py --seed 0"]
    assert printed == (f"{float(row['sft']):.3f}", f"{float(row['stepnft']):.3f}",
                       row["rl_episodes"])
    told = re.search(r"reaches the goal in (\d+) %, after π-StepNFT in (\d+) %", README).groups()
    assert told == tuple(f"{100 * float(row[name]):.0f}" for name in ("sft", "stepnft"))


@pytest.mark.parametrize("page", STUDIES)
def test_a_studys_page_is_short_and_has_its_headings(page):
    """A page beside the README of a study holds its long tables."""
    titles = re.findall(r"^## (.*)$", prose(PAGES[page]), re.M)
    if page.endswith("README.md") and page != "results/benchmark_width/README.md":
        assert titles[:3] == ["What was run", "What came out", "What it does not show"]
    assert PAGES[page].count("\n") <= 120 and len(plain(PAGES[page]).split()) <= 900


def test_the_notes_are_short():
    assert PAGES["results/NOTES.md"].count("\n") <= 60


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
    for folder in ("toy", "maniskill"):
        for row in tables.read(ROOT / f"results/{folder}/summary.csv"):
            script, flags = row["command"].split(" ", 1)
            section = PAGES[f"results/{folder}/README.md"].split(
                f"<!-- table: results/{folder}/summary.csv")[1]
            section = section.split(f"| `{script}` with |")[1].split("\n\n")[0]
            line, = [text for text in section.split("\n") if text.startswith(f"| `{flags}` |")]
            cells = [part.split()[0] for part in line.split("|")[2:5]]
            sft, after = float(row["sft"]), float(row["stepnft"])
            assert [float(part) for part in cells] == pytest.approx(
                [sft, after, round(100 * (after - sft), 1)])


def front_row(name):
    """A row of the front page's table -> its numbers: seeds, before, after, gain, low, high."""
    results = README.split("## Results")[1].split("\n")
    line, = [line for line in results if line.startswith(f"| {name}")]
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", line.split("|", 2)[2])]


@pytest.mark.parametrize("name, folder", [("[toy world]", "toy"), ("[ManiSkill]", "maniskill")])
def test_the_front_page_by_hand(name, folder):
    rows = tables.read(ROOT / f"results/{folder}/summary.csv")
    before, after = (100 * np.array([float(row[c]) for row in rows]) for c in ("sft", "stepnft"))
    interval = stats.ttest_rel(after, before).confidence_interval()
    assert front_row(name) == pytest.approx(
        [len(rows), before.mean(), after.mean(), (after - before).mean(), *interval], abs=0.051)


def test_libero_on_the_front_page_by_hand():
    """From the pooled episodes of each suite and seed: a task has 50 for all seeds."""
    won = {}
    for row in tables.read(ROOT / "results/libero/protocol.csv"):
        if row["method"] == "stepnft" and row["starts"] == "official initial states":
            if row["tested"] == row["suite"]:
                key = row["suite"], row["demos"], row["seed"]
                won.setdefault(key, {}).setdefault(row["policy"], []).append(
                    round(50 * float(row["success"])))
    rates = {key: [sum(tasks) / (50 * len(tasks)) for tasks in (
        policies["SFT"], policies["pi-StepNFT"])] for key, policies in won.items()}
    suites = ("libero_object", "libero_spatial", "libero_goal")
    each = 100 * np.array([[rates[suite, "1", seed] for suite in suites] for seed in "012"]).mean(1)
    gain = each[:, 1] - each[:, 0]
    low, high = stats.ttest_1samp(gain, 0).confidence_interval()
    assert front_row("[LIBERO]") == pytest.approx(
        [3, *each.mean(0), gain.mean(), low, high], abs=0.051)
    tasks = sum(len(won[suite, "1", "0"]["SFT"]) for suite in suites)
    assert f"{tasks} tasks of three suites, one demonstration each" in README
    (before, after), = [pair for key, pair in rates.items() if key[:2] == ("libero_10", "5")]
    assert front_row("beside it") == pytest.approx(
        [1, 100 * before, 100 * after, 100 * (after - before)], abs=0.051)
    assert len(won["libero_10", "5", "0"]["SFT"]) == 2


def test_the_tiny_pi0_by_hand():
    rows = tables.read(ROOT / "results/pi0/summary.csv")
    before, after = (np.mean([float(row[name]) for row in rows]) for name in ("sft", "after"))
    assert f"from {before:.3f} to {after:.3f} on PixelGap" in PAGES["policies/README.md"]


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
        assert noise == "0.2" or f"the lead there is {told(lead[0]).split()[0]};" in README
        assert told(less(lead[1], lead[0])) in report and told(less(lead[2], lead[0])) in report
        assert noise == "0.2" or told(less(group["endpoint"], tuned["endpoint"])) in report
    twelve = {name: ends("ablations", variant=name) | ends("ablations_tuning", variant=name, lr=lr)
              for name, lr in (("default", "0.001"), ("noise-0.5", "0.001"),
                               ("labels-grouped", "0.0003"))}
    for name in ("noise-0.5", "labels-grouped"):
        assert told(less(twelve[name], twelve["default"]), 12) in report


def test_a_changed_number_would_be_noticed():
    number = re.search(r"\| \d\d\.\d \|", README)[0]
    assert tables.refresh(README.replace(number, "| 99.9 |", 1)) == README


def test_a_changed_line_number_would_be_noticed():
    for page in ("README.md", "policies/README.md"):
        moved = re.sub(r"\.py#L\d+", ".py#L1", PAGES[page])
        assert moved != PAGES[page] == tables.refresh(moved, (ROOT / page).parent)


def test_the_readme_cites_no_file_that_is_missing():
    for piece in INLINE:
        if piece.startswith("results/"):
            assert list(ROOT.glob(piece.split()[0])), piece
    for page in STUDIES:  # a page names the files beside it
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


def test_the_hero_shows_other_episodes_than_those_that_chose_its_start(monkeypatch):
    """The second start passes: 1, 10 and 100 of 100; then what is shown, with other rates."""
    arrive = iter([30, 1, 10, 100, 9, 7, 93])
    played = []

    def trails(sample, seeds):
        played.append((sample, set(seeds)))
        return np.zeros((len(seeds), 1, 2)), np.arange(len(seeds)) < next(arrive)

    monkeypatch.setattr(figures, "trails", trails)
    monkeypatch.setattr(figures, "chunks", lambda policy, noise=0: (policy, noise))
    shown = figures.hero_episodes("sft", "trained", episodes=100)
    first, second = figures.episode_seeds("test", 1000)[:2]
    assert [shown[f"{name}_success"].sum() for name in ("narrow", "wide", "after")] == [9, 7, 93]
    narrow, wide, after = ("sft", 0), ("sft", figures.WIDE), ("trained", 0)
    assert played == [(narrow, {first}), *[(policy, {second}) for policy in 2 * [
        narrow, wide, after]]] and shown["seed"] == second


def test_the_hero_is_of_a_start_that_was_never_trained_on():
    toy = np.load(ROOT / "results/figures/toy.npz")
    assert toy["seed"] in figures.episode_seeds("test", 1000)
    for name in ("narrow", "wide", "after"):  # an episode that arrives ends at the goal
        away = np.linalg.norm(toy[name][:, -1] - figures.GapWorld.goal, axis=1)
        assert np.array_equal(away < figures.GapWorld.goal_radius, toy[f"{name}_success"])


def test_a_missing_table_is_skipped_with_a_line(tmp_path, capsys):
    for name in ("phase", "title", "libero_protocol", "maniskill"):
        getattr(figures, name)(tmp_path)
        assert f"skipped {name}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# The block of Python: it runs as it stands


def test_the_block_that_loads_a_policy_runs(tmp_path, monkeypatch):
    block, = re.findall(r"```python\n(.*?)```", PAGES["policies/README.md"], re.S)
    policy = RobotPolicy(2, 7, state_dim=18, width=8)
    monkeypatch.chdir(tmp_path)
    Path("runs/04_train_libero").mkdir(parents=True)
    save(Path("runs/04_train_libero/last.pt"), policy, argparse.Namespace(flags={}))
    names = {}
    exec(block, names)
    assert names["actions"].shape == (1, 2, 7) and names["x_0"].shape == (1, 2, 7)
    torch.testing.assert_close(names["policy"].state_dict(), policy.state_dict())
