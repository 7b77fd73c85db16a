"""notebooks/playground.html in a real headless Chromium: its numbers are torch's, its controls move
what they should, and keyboard, narrow windows and every kind of colour vision are served."""

import importlib
import math
import os
import re

import numpy as np
import pytest
import torch

from browser import Browser, find_browser
from conftest import ROOT
from envs.gap_world import GapWorld

flow, sde, nft, making = map(importlib.import_module, (
    "01_flow_policy", "02_sde_sampler", "03_step_loss", "notebooks.make_playground"))
PAGE = ROOT / "notebooks/playground.html"
HTML = PAGE.read_text()
POLICIES = making.policies_in(HTML)  # a copy of the page's weights, in torch
WHEN = ("before", "after")
pytestmark = pytest.mark.sim


# ------------------------------------------------------------------------------------------------
# The file


def test_it_is_what_the_template_and_the_scripts_make_of_its_weights():
    assert making.page(POLICIES) == HTML, "run notebooks/make_playground.py"


def test_it_is_one_small_file_that_loads_nothing():
    assert PAGE.stat().st_size <= 600_000
    for loads in (r"\bsrc\s*=", r"<link", r"\burl\(", r"@import", r"\bimport\b", r"\bfetch\b",
                  r"XMLHttp", r"https?://"):
        assert not re.search(loads, HTML), loads


def test_make_playground_writes_it_from_the_two_checkpoints(tmp_path, monkeypatch, capsys):
    trained, copy = POLICIES["after"], POLICIES["before"]
    torch.save(trained.state_dict(), tmp_path / "policy.pt")
    monkeypatch.setattr(making.flow, "toy_policy", lambda seed: copy)
    out = tmp_path / "playground.html"
    policy = tmp_path / "policy.pt"
    monkeypatch.setattr("sys.argv", ["", "--policy", str(policy), "--out", str(out)])
    making.main()
    assert out.read_text() == HTML
    monkeypatch.setattr("sys.argv", ["", "--policy", str(tmp_path / "none.pt")])
    with pytest.raises(SystemExit):
        making.main()
    assert "run 03_step_loss.py first" in capsys.readouterr().err


def test_the_policies_differ_as_before_and_after_rl_do():
    seeds = flow.episode_seeds("test", 300)
    before, after = (flow.evaluate(POLICIES[when], GapWorld(), seeds).mean() for when in WHEN)
    assert before < 0.65 and after > 0.85, (before, after)


# Colours as they look to people without one kind of cone (Machado, Oliveira and Fernandes 2009,
# severity 1; linear RGB)
VISION = {
    "usual": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
}


def linear_rgb(colour):
    value = np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b* of a linear RGB: distances in it are as the eye sees them, about."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                       [0.0193, 0.1192, 0.9505]])
    ratio = to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089]
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one, other):
    """WCAG 2's ratio of luminances."""
    high, low = sorted((linear_rgb(c) @ [0.2126, 0.7152, 0.0722] for c in (one, other)))[::-1]
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_are_told_apart_by_every_eye_and_stand_out(scheme):
    block = re.findall(r":root \{(.*?)\}", HTML, re.S)[scheme]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
    for name in ("ink", "grey"):  # text
        assert contrast(colours[name], colours["card"]) > 4.5
        assert contrast(colours[name], colours["page"]) > 4.5
    for name in ("blue", "orange", "green", "purple"):
        assert contrast(colours[name], colours["card"]) > 3, name
    for kind, matrix in VISION.items():
        seen = {name: lab(np.array(matrix) @ linear_rgb(c)) for name, c in colours.items()}
        for one, other in (("blue", "orange"), ("blue", "card"), ("orange", "card"),
                           ("purple", "card"), ("green", "card")):
            assert np.linalg.norm(seen[one] - seen[other]) > 20, (kind, one, other)


# ------------------------------------------------------------------------------------------------
# Its numbers


@pytest.fixture(scope="module")
def opened():
    if not find_browser():
        told = "no Chromium is installed (apt-get install chromium)"
        pytest.fail(told) if os.environ.get("REQUIRE_BROWSER") else pytest.skip(told)
    with Browser() as browser:
        browser.look(1000, 900)
        browser.open(PAGE)
        yield browser


@pytest.fixture
def page(opened):
    """The page as it stands at first."""
    settle(opened)
    first = opened.evaluate("({ ...playground.state })")
    yield opened
    opened.look(1000, 900)
    if opened.evaluate("({ ...playground.state })") != first:
        opened.call("() => document.getElementById('start_over').click()")
        settle(opened)


def settle(page):
    page.evaluate("playground.settled()")


def flat(tensor):
    return tensor.flatten().tolist()


SAMPLE = """(when, state, K, a, x_1, noise, corrected) => {
  const { x_0, path } = playground.sde_sample(playground.policies[when], Float64Array.from(state),
    K, a, Float64Array.from(x_1), noise, corrected);
  return [path.x, path.v].map((list) => list.map((array) => [...array])).concat([path.sigma]);
}"""


@pytest.mark.parametrize("K, a, corrected", [(1, 0.3, True), (4, 0, True), (4, 0.5, True),
                                             (4, 0.5, False), (16, 1, True)])
@pytest.mark.parametrize("when", WHEN)
def test_for_the_same_noise_its_chunk_is_torchs(page, when, K, a, corrected):
    B = 7  # no multiple of the four rows that it computes at once
    state = torch.rand(B, 3) * 2 - 1
    torch.manual_seed(1)
    x_1, *noise = (torch.randn(B, 4, 2) for _ in range(K + 1))
    torch.manual_seed(1)
    _, path = sde.sde_sample(POLICIES[when], {"state": state}, K, a, corrected=corrected)
    x, v, sigma = page.call(SAMPLE, when, flat(state), K, a, flat(x_1), [*map(flat, noise)],
                            corrected)
    for k in range(K + 1):
        np.testing.assert_allclose(x[k], flat(path.x[:, k]), atol=1e-4)
    for k in range(K):
        np.testing.assert_allclose(v[k], flat(path.v[:, k]), atol=1e-4)
    np.testing.assert_allclose(sigma, path.sigma[0], atol=1e-6)


def test_far_from_the_demonstrations_its_state_is_cut_as_torchs_is(page):
    state = torch.tensor([[30.0, -40.0, 9.0]])
    ctx = page.call("(state) => [...playground.encode(playground.policies.before, state)]",
                    flat(state))
    np.testing.assert_allclose(ctx, flat(POLICIES["before"].encode({"state": state})))
    assert max(map(abs, ctx)) == 5


def one_step(k, K=4, a=0.5):
    """x_t, v_old, v_theta, x_next of four actions, and where: t_cur, t_next, sigma; all double."""
    times = sde.time_grid(K).double()
    x_t, v_old, x_next = torch.randn(3, 1, 4, 2).double()
    delta = torch.randn(1, 4, 2).double() * torch.tensor([0.05, 0.2, 0.8, 3])[:, None]
    where = times[k], times[k + 1], sde.noise_scale(times, a)[k]
    return x_t, v_old, v_old + delta, x_next, where


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("corrected", [True, False])
def test_its_transition_and_its_step_error_are_torchs(page, k, corrected):
    x_t, v_old, _, x_next, where = one_step(k)
    grid = page.evaluate("playground.noise_scale(playground.time_grid(4), 0.5)")
    assert math.isclose(grid[k], where[2], abs_tol=1e-6)
    mean, std = sde.transition(x_t, v_old, *where, corrected)
    theirs = page.call("(...all) => { const { mean, std } = playground.transition(...all); "
                       "return [...mean, std]; }", flat(x_t), flat(v_old), *map(float, where),
                       corrected)
    np.testing.assert_allclose(theirs, [*flat(mean), float(std)], atol=1e-5)
    if corrected:  # 03 always judges by the corrected mean
        E = nft.step_error(v_old, x_t, x_next, *(z[None] for z in where))
        theirs = page.call("(...all) => [...playground.step_error(...all)]", flat(v_old),
                           flat(x_t), flat(x_next), *map(float, where))
        np.testing.assert_allclose(theirs, flat(E), rtol=1e-5)


LOSS = """(step) => {
  const { loss, gradient, v_pos, v_neg } = playground.step_nft_loss(step);
  return [loss, [...gradient], [...v_pos], [...v_neg]];
}"""


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("y", [1, -1])
def test_its_loss_and_gradient_are_torchs(page, k, y):
    x_t, v_old, v_theta, x_next, where = one_step(k)
    v_theta.requires_grad_()
    loss, _ = nft.step_nft_loss(v_theta, v_old, x_t, x_next, *(z[None] for z in where),
                                torch.tensor([float(y)]).double())
    gradient, = torch.autograd.grad(loss, v_theta)
    names = dict(zip(("t_cur", "t_next", "sigma"), map(float, where)))
    theirs = page.call(LOSS, {"v_theta": flat(v_theta), "v_old": flat(v_old), "x_t": flat(x_t),
                              "x_next": flat(x_next), "y": y, **names})
    assert math.isclose(theirs[0], loss.item(), rel_tol=1e-5)
    np.testing.assert_allclose(theirs[1], flat(gradient), rtol=1e-4, atol=1e-7)
    for v, own in zip(theirs[2:], nft.mirror(v_theta, v_old, 1.0, 0.5)):
        np.testing.assert_allclose(v, flat(own), rtol=1e-5, atol=1e-9)


PLAY = """(when, y, gap_y, noise) => {
  const act = (state, episodes, chunk) => {
    const [x_1, ...draws] = noise[chunk].map((all) => Float64Array.from(
      episodes.flatMap((episode) => all.slice(8 * episode, 8 * episode + 8))));
    const policy = playground.policies[when];
    return playground.denormalise(policy,
      playground.sde_sample(policy, state, 4, 0.5, x_1, draws).x_0);
  };
  return playground.GapWorld.play(act, y, gap_y);
}"""


@pytest.mark.parametrize("when", WHEN)
def test_for_the_same_noise_its_episodes_are_gap_worlds(page, when):
    world, seeds = GapWorld(), flow.episode_seeds("test", 60)
    state, count = world.reset(seeds)["state"], 60
    torch.manual_seed(2)
    noise = [[flat(torch.randn(count, 4, 2)) for _ in range(5)] for _ in range(6)]
    torch.manual_seed(2)

    def act(obs):  # draws x_1, then four times the noise of a step, for all episodes
        return POLICIES[when].denormalise(sde.sde_sample(POLICIES[when], obs, 4, 0.5)[0]), {}

    success, _ = world.play(act, seeds)
    theirs = page.call(PLAY, when, flat(state[:, 1]), flat(state[:, 2]), noise)
    assert 0 < success.sum() < count
    assert theirs["success"] == success.tolist()
    own = np.stack(world.trail, axis=1)                                       # (60, T+1, 2)
    for trail, positions in zip(theirs["trail"], own):
        trail = np.reshape(trail, (-1, 2))
        np.testing.assert_allclose(trail, positions[:len(trail)], atol=1e-3)
        np.testing.assert_allclose(positions[len(trail):] - trail[-1], 0, atol=1e-3)  # it is over


def test_its_noise_is_standard_normal_and_can_be_drawn_again(page):
    draw = "(seed) => [...playground.randn(seed, 40000)]"
    one, again, other = (np.array(page.call(draw, seed)) for seed in (3, 3, 4))
    assert (one == again).all() and abs(np.corrcoef(one, other)[0, 1]) < 0.02
    assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.02
    assert abs(one.mean()) < 0.02 and abs(one.std() - 1) < 0.02
    assert abs((one ** 4).mean() - 3) < 0.2 and abs((abs(one) > 1.96).mean() - 0.05) < 0.005


def shown_success(page, when):
    text = page.evaluate(f"document.getElementById('{when}_success').textContent")
    return int(re.match(r"(\d+) of 200 episodes arrive", text)[1]) / 200


@pytest.mark.parametrize("a, when", [(0.0, "before"), (0.0, "after"), (0.5, "after")])
def test_the_success_that_it_tells_is_the_policys(page, a, when):
    """From the page's start, with noise of its own, against 2,000 episodes in torch."""
    page.call("(a) => playground.set({ noise_level: a })", a)
    settle(page)
    y, gap_y = page.evaluate("[playground.state.start_y, playground.state.gap_y]")
    world, count = GapWorld(), 2000
    start = world.reset
    world.reset = lambda seeds: start(seeds) and put(world, y, gap_y)

    def act(obs):
        return POLICIES[when].denormalise(sde.sde_sample(POLICIES[when], obs, 4, a)[0]), {}

    rate = world.play(act, [0] * count)[0].mean()
    error = math.sqrt(max(rate * (1 - rate), 0.01) * (1 / 200 + 1 / count))
    assert abs(shown_success(page, when) - rate) < 4 * error


def put(world, y, gap_y):
    world.position[:, 1], world.gap_y[:] = y, gap_y
    return world.observe()


# ------------------------------------------------------------------------------------------------
# Its controls


def state(page, name):
    return page.evaluate(f"playground.state.{name}")


def spread(page, when):
    text = page.evaluate(f"document.getElementById('{when}_spread').textContent")
    return float(text.split()[-1])


def press(page, control, key, times=1):
    """Keys on a control, by its id or selector."""
    selector = control if control.startswith("input") else f"#{control}"
    page.call("(selector) => document.querySelector(selector).focus()", selector)
    page.key(key, times)
    settle(page)


def picture(page, canvas):
    return page.call("(id) => document.getElementById(id).toDataURL()", canvas)


ALL = ["before_world", "after_world", "before_paths", "after_paths", "gaussian", "loss"]


@pytest.mark.parametrize("slider, key, value, changed", [
    ("start_y", "PageDown", 0.52, ALL[:4]),  # near 0.7 its chunks are alike: the state is cut
    ("gap_y", "ArrowRight", 0.2, ALL[:4]),
    ("noise_level", "ArrowRight", 0.55, ALL),
    ("num_steps", "ArrowRight", 5, ALL),
    ("sample", "ArrowRight", 24, ["before_paths", "gaussian", "loss"]),
    ("step", "ArrowRight", 2, ["before_paths", "gaussian", "loss"]),
    ("delta_x", "ArrowRight", -0.2, ["gaussian", "loss"]),
    ("delta_y", "ArrowLeft", 0.35, ["gaussian", "loss"]),
])
def test_a_key_moves_a_slider_and_what_depends_on_it(page, slider, key, value, changed):
    before = {canvas: picture(page, canvas) for canvas in ALL}
    press(page, slider, key)
    assert state(page, slider) == pytest.approx(value)
    told = page.evaluate(f"document.querySelector('output[for={slider}]').textContent")
    assert f"{value:g}".replace("-", "−") in told
    moved = {canvas for canvas in ALL if picture(page, canvas) != before[canvas]}
    assert moved >= set(changed)
    if slider in ("sample", "step", "delta_x", "delta_y"):
        assert not moved & {"before_world", "after_world", "after_paths"}  # nothing else moves


def test_wider_noise_spreads_the_chunks_and_fewer_trained_episodes_arrive(page):
    press(page, "noise_level", "Home")
    narrow, certain = spread(page, "before"), shown_success(page, "after")
    press(page, "noise_level", "End")
    assert state(page, "noise_level") == 1
    assert spread(page, "before") > 3 * narrow and shown_success(page, "after") < certain - 0.2


def test_more_steps_draw_longer_paths_and_the_chosen_step_stays_one_of_them(page):
    press(page, "num_steps", "End")
    assert page.evaluate("playground.played.after.path.x.length") == 17
    press(page, "step", "End")
    assert state(page, "step") == 15
    press(page, "num_steps", "Home")
    assert (state(page, "num_steps"), state(page, "step")) == (1, 0)


def test_without_the_correction_fine_steps_spread_more(page):
    press(page, "num_steps", "End")
    with_it = spread(page, "before")
    press(page, "corrected", " ")
    assert state(page, "corrected") is False and spread(page, "before") > 1.3 * with_it


def test_draw_again_changes_the_draws_and_nothing_else(page):
    settings = page.evaluate("({ ...playground.state, seed: 0 })")
    one, rate = page.evaluate("playground.played.after.heights"), shown_success(page, "after")
    press(page, "draw_again", " ")
    other = page.evaluate("playground.played.after.heights")
    assert len(one) == len(other) == 200 and one != other
    assert abs(shown_success(page, "after") - rate) < 0.25
    assert page.evaluate("({ ...playground.state, seed: 0 })") == settings
    press(page, "start_over", " ")
    assert page.evaluate("playground.played.after.heights") == one


def centre(page, canvas, x, y):
    """Pixels in the window of a point of a picture, which is scrolled into sight."""
    return page.call("""(id, x, y) => {
      const canvas = document.getElementById(id);
      canvas.scrollIntoView({ block: "center" });
      const box = canvas.getBoundingClientRect(), [px, py] = playground.pictures[id].at(x, y);
      return [box.left + px, box.top + py];
    }""", canvas, x, y)


def test_start_and_gap_can_be_dragged(page):
    page.drag(centre(page, "after_world", -0.8, 0.7), centre(page, "after_world", -0.8, -0.3))
    settle(page)
    assert state(page, "start_y") == pytest.approx(-0.3, abs=0.02)
    trails = page.evaluate("playground.played.before.trail.map((trail) => trail[1])")
    assert trails == [state(page, "start_y")] * 200
    page.drag(centre(page, "before_world", 0, 0.19), centre(page, "before_world", 0, -0.8))
    settle(page)
    assert state(page, "gap_y") == -0.3  # as far as it goes
    nothing = centre(page, "before_world", 0.5, 0)
    before = page.evaluate("({ ...playground.state })")
    page.drag(nothing, [nothing[0], nothing[1] + 60])
    assert page.evaluate("({ ...playground.state })") == before


def test_a_click_chooses_a_step_of_the_policy_that_was_clicked(page):
    path = page.evaluate("playground.played.after.path.x.map((x) => x[8 * 6 + 1])")  # the seventh
    point = centre(page, "after_paths", 0.375, (path[2] + path[3]) / 2)
    page.mouse("mousePressed", *point)
    page.mouse("mouseReleased", *point)
    settle(page)
    assert (state(page, "acting"), state(page, "step")) == ("after", 2)
    chosen = state(page, "sample")
    heights = page.evaluate(f"playground.played.after.path.x.map((x) => x[8 * {chosen - 1} + 1])")
    assert (heights[2] + heights[3]) / 2 == pytest.approx((path[2] + path[3]) / 2, abs=0.05)
    ended = page.evaluate(f"playground.played.after.success[{chosen - 1}]")
    assert state(page, "y") == (1 if ended else -1)  # its own label


def test_the_trained_mean_follows_the_pointer(page):
    mean = page.evaluate("[...playground.chosen_step().mean]")
    aim = [mean[0] + 0.05, mean[1] - 0.08]
    page.drag(centre(page, "gaussian", *mean), centre(page, "gaussian", *aim))
    settle(page)
    theirs = page.evaluate("(() => { const step = playground.chosen_step(); "
                           "return [...step.mean_of(step.v_theta)]; })()")
    np.testing.assert_allclose(theirs, aim, atol=0.01)


def verdict(page):
    return [page.evaluate(f"document.getElementById('{name}').textContent")
            for name in ("ranking", "lesson")]


@pytest.mark.parametrize("y", [1, -1])
@pytest.mark.parametrize("towards", [1, -1])
def test_the_words_say_who_wins_and_what_the_label_does(page, y, towards):
    """v_theta moved towards x_next, or away from it, by 0.3."""
    page.call("""(y, towards) => {
      const { mean, x_next } = playground.chosen_step();
      const miss = [x_next[0] - mean[0], x_next[1] - mean[1]], size = Math.hypot(...miss);
      playground.set({ y, delta_x: -0.3 * towards * miss[0] / size,
                       delta_y: -0.3 * towards * miss[1] / size });
    }""", y, towards)
    settle(page)
    ranking, lesson = verdict(page)
    winner = "v_pos" if towards == 1 else "v_neg"
    assert f"{winner} explains the step better" in ranking
    should = "v_pos" if y == 1 else "v_neg"
    right = should == winner
    assert f"The label says {should} should, and it does{'' if right else ' not'}:" in lesson
    assert ("below ln 2" if right else "above ln 2") in lesson
    assert ("the way that the noise went" if y == 1 else "against the way") in lesson
    # and so it is: a small step against the gradient moves the mean towards x_next, or away
    along = page.evaluate("""(() => {
      const { mean, x_next, slope, gradient } = playground.chosen_step();
      return -slope * (gradient[0] * (x_next[0] - mean[0]) + gradient[1] * (x_next[1] - mean[1]));
    })()""")
    assert along * y > 0


def test_the_label_is_toggled_by_keys(page):
    assert state(page, "y") == 1
    lesson = verdict(page)[1]
    press(page, 'input[name="y"]', "ArrowRight")
    assert state(page, "y") == -1 and verdict(page)[1] != lesson


def test_without_noise_both_branches_tie(page):
    press(page, "noise_level", "Home")
    ranking, lesson = verdict(page)
    assert "No noise" in ranking and "one outcome teaches nothing" in lesson
    step = page.evaluate("(() => { const { E_pos, E_neg, loss } = playground.chosen_step(); "
                         "return [E_pos[0], E_neg[0], loss]; })()")
    assert step[0] == pytest.approx(step[1]) and step[2] == pytest.approx(math.log(2), abs=1e-3)


# ------------------------------------------------------------------------------------------------
# For everybody


def test_every_control_has_a_label_and_is_reached_by_tab_with_a_visible_focus(page):
    controls = page.evaluate("""[...document.querySelectorAll("input, button")]
        .map((control) => [control.id || control.name, control.labels.length, control.type])""")
    assert all(labels for _, labels, kind in controls if kind != "button")
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(len(controls)):
        page.key("Tab")
        name, outline = page.evaluate("""(() => {
          const control = document.activeElement, style = getComputedStyle(control);
          return [control.id || control.name, style.outlineStyle + style.outlineWidth];
        })()""")
        if name:
            reached.add(name)
            assert outline == "solid3px", name
    assert reached == {name for name, *_ in controls}


def test_pictures_and_numbers_are_told_in_words(page):
    for canvas in ALL:
        words = page.evaluate(f"document.getElementById('{canvas}').getAttribute('aria-label')")
        assert re.search(r"\d", words), canvas
    live = page.evaluate("""["before_success", "after_success", "ranking", "lesson"].every((id) =>
        document.getElementById(id).closest("output, [aria-live]"))""")
    assert live


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1000])
def test_it_fits_a_narrow_window_and_both_schemes(page, width, dark):
    page.look(width, 900, dark)
    page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate("""[...document.querySelectorAll("canvas")].map((canvas) =>
        [canvas.getBoundingClientRect().left, canvas.clientWidth, canvas.width])""")
    assert all(left >= 0 and left + shown <= width for left, shown, _ in boxes)
    assert all(shown == drawn and shown > 300 for _, shown, drawn in boxes)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == dark


def test_what_failed_is_drawn_in_the_schemes_orange_and_what_arrived_in_its_blue(page):
    for dark in (False, True):
        page.look(1000, 900, dark)
        page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")
        share = {}
        for when in WHEN:
            pixels = page.evaluate(f"""(() => {{
              const canvas = document.getElementById("{when}_world");
              const data = canvas.getContext("2d")
                .getImageData(0, 0, canvas.width, canvas.height).data;
              let blue = 0, orange = 0;
              for (let i = 0; i < data.length; i += 4) {{
                if (data[i + 3] < 100) continue;
                if (data[i + 2] > data[i] + 60) blue++;
                if (data[i] > data[i + 2] + 60) orange++;
              }}
              return [blue, orange];
            }})()""")
            share[when] = pixels[0] / sum(pixels)
        assert share["before"] < 0.4 < 0.7 < share["after"], (dark, share)


def test_a_change_is_quick(page):
    """Processor time of the page's main thread, the best of five: what others compute on this
    machine does not count. 400 episodes, their drawing and their words."""
    page.send("Performance.enable", timeDomain="threadTicks")

    def busy():
        metrics = page.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    seconds = []
    for i in range(5):
        begin = busy()
        page.call("(a) => playground.set({ noise_level: a })", 0.5 + 0.01 * i)
        settle(page)
        seconds.append(busy() - begin)
    page.send("Performance.disable")
    print("seconds of a change:", seconds)
    assert min(seconds) < 0.2


def test_it_asks_the_network_for_nothing_and_its_scripts_do_not_fail(page):
    assert set(page.requests) == {PAGE.as_uri()}
    assert page.errors == []
