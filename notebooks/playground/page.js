// The page: what the sliders say is played, drawn, and told in words. The method is in method.js.

"use strict";

const EPISODES = 200, DRAWN = 60, PATHS = 40;   // played; drawn in the world; drawn over t
const MOST_CHUNKS = GapWorld.max_steps / H, MOST_STEPS = 16;
const WHEN = ["before", "after"];               // the two policies
const MAX_DRIFT = 0.5;

const DEFAULTS = {
  start_y: 0.7, gap_y: 0.19, noise_level: 0.5, num_steps: 4, corrected: true, seed: 1,
  acting: "before", sample: 23, step: 1, delta_x: -0.21, delta_y: 0.36, y: 1,
};
const state = { ...DEFAULTS };

const element = (id) => document.getElementById(id);
const weights = JSON.parse(element("weights").textContent);
const policies = {};
for (const when of WHEN) policies[when] = load_policy(weights[when]);


// -------------------------------------------------------------------------------------------------
// Playing: 200 episodes of both policies, from one start


// normal[chunk][k]: standard normal numbers for all episodes; k = 0 is x_1, k + 1 the noise of step
// k. They depend on the seed alone, so that moving a slider changes nothing but what it says.
let normal = [], drawn_seed = null;

function draw_noise() {
  if (drawn_seed === state.seed) return;
  drawn_seed = state.seed;
  const size = EPISODES * D;
  const numbers = randn(state.seed, size * MOST_CHUNKS * (MOST_STEPS + 1));
  normal = Array.from({ length: MOST_CHUNKS }, (_, chunk) =>
    Array.from({ length: MOST_STEPS + 1 }, (_, k) => {
      const at = (chunk * (MOST_STEPS + 1) + k) * size;
      return numbers.subarray(at, at + size);
    }));
}


// the rows of some episodes, from an array for all of them
function take(numbers, episodes) {
  const rows = new Float64Array(episodes.length * D);
  episodes.forEach((episode, row) => {
    rows.set(numbers.subarray(episode * D, (episode + 1) * D), row * D);
  });
  return rows;
}


// Plays the episodes first, first + 1, .. last - 1 -> { success, trail, path: of the first chunk }
function play(policy, first, last) {
  const { start_y, gap_y, num_steps, noise_level, corrected } = state;
  const count = last - first;
  let first_path = null;
  const act = (observed, playing, chunk) => {
    const episodes = playing.map((row) => first + row);
    const [x_1, ...noise] = normal[chunk].slice(0, num_steps + 1).map((z) => take(z, episodes));
    const { x_0, path } =
      sde_sample(policy, observed, num_steps, noise_level, x_1, noise, corrected);
    first_path = first_path || path;
    return denormalise(policy, x_0);
  };
  const { success, trail } =
    GapWorld.play(act, Array(count).fill(start_y), Array(count).fill(gap_y));
  return { success, trail, path: first_path };
}


// What was played, for each policy: success and trail of each episode, heights: x_0's vertical
// velocity of the first action; path: of the first chunks of the first slice.
const played = {};
let change = 0;                 // counts the changes: an older one that is still played gives up
let done = Promise.resolve();   // tests wait for it
const timing = { first: 0, all: 0 };   // milliseconds until the pictures stand, and all episodes


// The 60 episodes that are drawn come first, the others after the picture, in slices between which
// the browser may listen to the next movement.
async function replay() {
  const mine = ++change, begin = performance.now();
  draw_noise();
  for (const when of WHEN) played[when] = { success: [], trail: [], heights: [], path: null };
  for (let first = 0; first < EPISODES;) {
    const slice = Math.ceil(560 / state.num_steps);   // about as long whatever K is
    const last = first === 0 ? DRAWN : Math.min(EPISODES, first + slice);
    for (const when of WHEN) {
      const { success, trail, path } = play(policies[when], first, last);
      const all = played[when];
      all.success.push(...success);
      all.trail.push(...trail);
      all.path = all.path || path;
      const x_0 = path.x[state.num_steps];
      for (let i = 1; i < x_0.length; i += D) all.heights.push(x_0[i]);
    }
    if (first === 0) {
      draw_all();
      timing.first = performance.now() - begin;
    }
    first = last;
    if (first < EPISODES) await new Promise((resume) => setTimeout(resume));
    if (mine !== change) return;
  }
  tell_success();
  timing.all = performance.now() - begin;
  element("timing").textContent = `pictures after ${timing.first.toFixed(0)} ms, all ` +
    `${2 * EPISODES} episodes after ${timing.all.toFixed(0)} ms`;
}


function std(values) {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const squares = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  return Math.sqrt(squares / (values.length - 1));
}


function tell_success() {
  for (const when of WHEN) {
    const { success, heights } = played[when];
    const arrived = success.filter((ok) => ok).length;
    const rate = (100 * arrived / success.length).toFixed(0);
    const text = `${arrived} of ${success.length} episodes arrive (${rate} %)`;
    element(`${when}_success`).textContent = text;
    element(`${when}_world`).setAttribute("aria-label",
      `From start y ${state.start_y.toFixed(2)}, gap at ${state.gap_y.toFixed(2)}: ${text}`);
    const width = `the actions' spread (std at t = 0): ${std(heights).toFixed(3)}`;
    element(`${when}_spread`).textContent = width;
    element(`${when}_paths`).setAttribute("aria-label",
      `${PATHS} denoising paths in ${state.num_steps} steps; ${width}`);
  }
}


// -------------------------------------------------------------------------------------------------
// Drawing


const EVEN = { above: 6, below: 6, before: 6, after: 6 };   // pixels around a picture


// A canvas with axes, in the units of the data: x from left to right, y from bottom to top.
// `equal`: a unit is as long on both.
class Picture {
  constructor(canvas, { left, right, bottom, top, margin = EVEN, equal = false }) {
    const ratio = window.devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    const pixels = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== pixels[0] || canvas.height !== pixels[1]) {
      [canvas.width, canvas.height] = pixels;
    }
    this.pen = canvas.getContext("2d");
    this.pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.pen.clearRect(0, 0, width, height);
    this.pen.lineJoin = "round";
    this.pen.font = `13px ${getComputedStyle(document.body).fontFamily}`;
    const { above, below, before, after } = margin;
    this.scale_x = (width - before - after) / (right - left);
    this.scale_y = (height - above - below) / (top - bottom);
    if (equal) this.scale_x = this.scale_y = Math.min(this.scale_x, this.scale_y);
    this.centre = [(before + width - after) / 2, (above + height - below) / 2];
    this.middle = [(left + right) / 2, (bottom + top) / 2];
    this.size = [width, height];
  }

  // data -> pixels, and back
  at(x, y) {
    return [this.centre[0] + (x - this.middle[0]) * this.scale_x,
            this.centre[1] - (y - this.middle[1]) * this.scale_y];
  }

  back(pixel_x, pixel_y) {
    return [this.middle[0] + (pixel_x - this.centre[0]) / this.scale_x,
            this.middle[1] - (pixel_y - this.centre[1]) / this.scale_y];
  }

  line(points, color, { width = 1, dash = [], shift = 0, alpha = 1 } = {}) {
    this.pen.save();
    this.pen.strokeStyle = color;
    this.pen.lineWidth = width;
    this.pen.globalAlpha = alpha;
    this.pen.setLineDash(dash);
    this.pen.lineDashOffset = shift;
    this.pen.beginPath();
    for (const [x, y] of points) this.pen.lineTo(...this.at(x, y));
    this.pen.stroke();
    this.pen.restore();
  }

  // a marker: its outline by name, its size in pixels
  mark(x, y, shape, color, { size = 5, alpha = 1, hollow = false } = {}) {
    const [px, py] = this.at(x, y);
    const pen = this.pen;
    pen.save();
    pen.globalAlpha = alpha;
    pen.fillStyle = pen.strokeStyle = color;
    pen.lineWidth = 2;
    pen.beginPath();
    if (shape === "dot") pen.arc(px, py, size, 0, 2 * Math.PI);
    if (shape === "square") pen.rect(px - size, py - size, 2 * size, 2 * size);
    if (shape === "cross") {
      pen.moveTo(px - size, py - size);
      pen.lineTo(px + size, py + size);
      pen.moveTo(px - size, py + size);
      pen.lineTo(px + size, py - size);
    }
    if (shape === "diamond") {
      for (const [i, j] of [[0, -1], [1, 0], [0, 1], [-1, 0]]) {
        pen.lineTo(px + i * size, py + j * size);
      }
      pen.closePath();
    }
    if (shape === "star") {
      for (let i = 0; i < 10; i++) {
        const radius = i % 2 ? size * 0.4 : size, angle = i * Math.PI / 5;
        pen.lineTo(px + radius * Math.sin(angle), py - radius * Math.cos(angle));
      }
      pen.closePath();
    }
    if (shape === "cross" || hollow) pen.stroke();
    else pen.fill();
    pen.restore();
  }

  circle(x, y, radius, color, { fill = false, dash = [], alpha = 1 } = {}) {
    const pen = this.pen;
    pen.save();
    pen.globalAlpha = alpha;
    pen.fillStyle = pen.strokeStyle = color;
    pen.setLineDash(dash);
    pen.beginPath();
    pen.arc(...this.at(x, y), radius * this.scale_y, 0, 2 * Math.PI);
    if (fill) pen.fill();
    else pen.stroke();
    pen.restore();
  }

  // text at a point, moved by pixels but not out of the picture; a halo of the card's colour keeps
  // it readable over lines
  text(words, x, y, color, { align = "left", move = [0, 0] } = {}) {
    const pen = this.pen, [px, py] = this.at(x, y);
    const length = pen.measureText(words).width;
    const before = { left: 0, center: length / 2, right: length }[align];
    const within = (value, room) => Math.max(3, Math.min(value, room));
    const left = within(px + move[0] - before, this.size[0] - length - 3);
    const middle = within(py + move[1], this.size[1] - 8);
    pen.save();
    pen.textBaseline = "middle";
    pen.lineWidth = 4;
    pen.strokeStyle = colors().card;
    pen.strokeText(words, left, middle);
    pen.fillStyle = color;
    pen.fillText(words, left, middle);
    pen.restore();
  }
}


function colors() {
  const style = getComputedStyle(document.documentElement);
  const names = ["card", "ink", "grey", "line", "blue", "orange", "green", "purple"];
  const value = (name) => style.getPropertyValue(`--${name}`).trim();
  return Object.fromEntries(names.map((name) => [name, value(name)]));
}


const pictures = {};   // of each canvas, for the pointer


function draw_world(when) {
  const { success, trail } = played[when], c = colors();
  const picture = new Picture(element(`${when}_world`),
    { left: -1, right: 1, bottom: -1.06, top: 1.06, equal: true });
  pictures[`${when}_world`] = picture;
  const { gap, goal, goal_radius, start_x } = GapWorld;
  for (const [low, high] of [[-1, state.gap_y - gap], [state.gap_y + gap, 1]]) {
    picture.line([[0, low], [0, high]], c.ink, { width: 4 });
  }
  picture.circle(...goal, goal_radius, c.green, { fill: true, alpha: 0.6 });

  const points = (episode) => {
    const flat = trail[episode];
    return Array.from({ length: flat.length / 2 }, (_, i) => [flat[2 * i], flat[2 * i + 1]]);
  };
  for (const ok of [false, true]) {   // those that arrive lie on top
    const color = ok ? c.blue : c.orange, dash = ok ? [] : [2, 3];
    for (let episode = 0; episode < DRAWN; episode++) {
      if (success[episode] !== ok) continue;
      const way = points(episode), shift = 1.7 * episode;   // so that dots do not line up
      picture.line(way.slice(H), color, { dash, shift, alpha: 0.5 });
      picture.line(way.slice(0, H + 1), color, { width: 1.8, dash, shift, alpha: 0.75 });
      picture.mark(...way[way.length - 1], ok ? "dot" : "cross", color,
        { size: ok ? 3 : 4, alpha: 0.7 });
    }
  }
  picture.mark(start_x, state.start_y, "dot", c.ink, { size: 7 });
  const beside_start = state.start_y > 0 ? -20 : 20;
  picture.text("↕ start", start_x, state.start_y, c.ink, { move: [-14, beside_start] });
  const beside_gap = state.gap_y > 0 ? -30 : 30;   // the ways go from the gap to the middle
  picture.text("↕ gap", 0, state.gap_y, c.ink, { move: [10, beside_gap] });
  picture.text("wall", 0, -0.85, c.ink, { move: [10, 0] });
  picture.text("goal", ...goal, c.ink, { align: "center", move: [0, 32] });
}


// the vertical velocity of the first action along path `sample`: K+1 numbers
function heights_of(when, sample) {
  return played[when].path.x.map((x) => x[(sample - 1) * D + 1]);
}


function draw_paths(when) {
  const c = colors(), times = time_grid(state.num_steps);
  const margin = { above: 6, below: 38, before: 30, after: 14 };
  const picture = new Picture(element(`${when}_paths`),
    { left: 1, right: 0, bottom: -3.2, top: 3.2, margin });
  pictures[`${when}_paths`] = picture;
  for (const t of times) {
    picture.line([[t, -3.2], [t, 3.2]], c.line);
    if (state.num_steps <= 5 || t === 0 || t === 1) {
      picture.text(String(rounded(t)), t, -3.2, c.grey, { align: "center", move: [0, 11] });
    }
  }
  for (const value of [-2, 0, 2]) {
    const number = String(value).replace("-", "−");
    picture.text(number, 1, value, c.grey, { align: "right", move: [-8, 0] });
  }
  picture.text("t: from noise (1) to action (0)", 0.5, -3.2, c.grey,
    { align: "center", move: [0, 28] });

  const line_of = (sample) => heights_of(when, sample).map((height, k) => [times[k], height]);
  for (const ok of [false, true]) {
    for (let sample = 1; sample <= PATHS; sample++) {
      if (played[when].success[sample - 1] !== ok) continue;
      const look = ok ? { alpha: 0.6 } : { dash: [2, 3], shift: 1.7 * sample, alpha: 0.6 };
      picture.line(line_of(sample), ok ? c.blue : c.orange, look);
    }
  }
  if (when !== state.acting) return;
  const chosen = line_of(state.sample);
  picture.line(chosen, c.ink, { width: 2 });
  for (const point of chosen) picture.mark(...point, "dot", c.ink, { size: 3 });

  // the step's Gaussian, seen from the side: two std up and down from its mean
  const { mean, std, k } = chosen_step();
  picture.line([[times[k + 1], mean[1] - 2 * std], [times[k + 1], mean[1] + 2 * std]], c.purple,
    { width: 9, alpha: 0.45 });
  picture.line(chosen.slice(k, k + 2), c.purple, { width: 4 });
  picture.mark(...chosen[k + 1], "star", c.ink, { size: 8 });
}


// Everything about the chosen step, first action only: arrays of two numbers.
function chosen_step() {
  const { acting, sample, step: k, corrected, num_steps, y } = state;
  const times = time_grid(num_steps), { path } = played[acting];
  const two = (array) => array.slice((sample - 1) * D, (sample - 1) * D + A);
  const x_t = two(path.x[k]), x_next = two(path.x[k + 1]), v_old = two(path.v[k]);
  const v_theta = Float64Array.of(v_old[0] + state.delta_x, v_old[1] + state.delta_y);
  const where = { t_cur: times[k], t_next: times[k + 1], sigma: path.sigma[k], corrected };
  const mean_of = (v) =>
    transition(x_t, v, where.t_cur, where.t_next, where.sigma, corrected).mean;
  const { mean, std } =
    transition(x_t, v_old, where.t_cur, where.t_next, where.sigma, corrected);
  const slope = mean_slope(where.t_cur, where.t_next, where.sigma, corrected);
  const judged = step_nft_loss({ v_theta, v_old, x_t, x_next, y, ...where },
    { max_drift: MAX_DRIFT });
  return { k, x_t, x_next, v_old, v_theta, mean, mean_of, std, slope, ...where, ...judged, y };
}


function draw_gaussian() {
  const c = colors(), step = chosen_step(), { mean, std, x_next, slope } = step;
  const mean_pos = step.mean_of(step.v_pos), mean_neg = step.mean_of(step.v_neg);
  const mean_theta = step.mean_of(step.v_theta);
  // as far as anything can lie, whatever delta is, so that dragging does not move the view
  const miss = Math.hypot(x_next[0] - mean[0], x_next[1] - mean[1]);
  const reach = 1.15 * Math.max(1.2 * std, miss, 0.75 * Math.abs(slope));
  const picture = new Picture(element("gaussian"), {
    left: mean[0] - reach, right: mean[0] + reach, bottom: mean[1] - reach, top: mean[1] + reach,
    equal: true });
  pictures.gaussian = picture;

  for (let i = 20; i > 0; i--) {   // many pale discs make the bell
    picture.circle(...mean, 2.5 * std * i / 20, c.purple, { fill: true, alpha: 0.025 });
  }
  for (const n of [1, 2]) {
    picture.circle(...mean, n * std, c.grey, { dash: [4, 4] });
    if (std > 0 && n * std < reach) {
      picture.text(`${n} std`, mean[0], mean[1] - n * std, c.grey, { align: "center" });
    }
  }
  const wins = step.E_pos[0] < step.E_neg[0] ? "pos" : "neg", tie = std === 0;
  for (const [point, color, name] of [[mean_pos, c.blue, "pos"], [mean_neg, c.orange, "neg"]]) {
    picture.line([x_next, point], color,
      { width: name === wins && !tie ? 3 : 1.5, dash: name === wins && !tie ? [] : [3, 4] });
  }
  picture.line([mean_neg, mean_pos], c.grey, { width: 1 });
  const tip = draw_arrow(picture, mean_pos, step);

  picture.mark(...mean, "diamond", c.grey, { size: 6 });
  picture.mark(...mean_neg, "square", c.orange, { size: 7 });
  picture.mark(...mean_theta, "dot", c.blue, { size: 11, hollow: true });
  picture.mark(...mean_pos, "dot", c.blue, { size: 8 });
  picture.mark(...x_next, "star", c.ink, { size: 12 });

  const name = name_between([mean, mean_pos, mean_neg, mean_theta, x_next, tip,
    middle(x_next, mean_pos), middle(x_next, mean_neg), middle(mean, mean_pos),
    middle(mean, mean_neg), middle(mean_pos, tip)].map((point) => picture.at(...point)));
  name(picture, "x_next", x_next, c.ink);
  name(picture, "mean(v_pos)", mean_pos, c.blue);
  name(picture, "mean(v_neg)", mean_neg, c.orange);
  const apart = Math.hypot(mean_pos[0] - mean[0], mean_pos[1] - mean[1]) * picture.scale_y;
  if (apart > 24) name(picture, "mean(v_old)", mean, c.grey);   // else it lies under the others
}


function middle(a, b) {
  return [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2];
}


// A function that writes names beside points, on the side that is farthest from what lies around:
// `around`, in pixels, and the names written before.
function name_between(around) {
  return (picture, words, point, color) => {
    const half = picture.pen.measureText(words).width / 2, [px, py] = picture.at(...point);
    const [width, height] = picture.size;
    let best = null;
    for (const [x, y] of [[0, -22], [0, 22], [half + 16, 0], [-half - 16, 0]]) {
      // its box from left to right and above to below; how far outside is everything around?
      const [left, right, above, below] = [px + x - half, px + x + half, py + y - 8, py + y + 8];
      const distances = around.map((other) => Math.hypot(
        Math.max(0, left - other[0], other[0] - right),
        Math.max(0, above - other[1], other[1] - below)));
      const outside = Math.max(0, -left, right - width, -above, below - height);
      const room = Math.min(...distances) - 100 * outside;
      if (!best || room > best.room) best = { x, y, room };
    }
    picture.text(words, ...point, color, { align: "center", move: [best.x, best.y] });
    for (const end of [-half, -half / 2, 0, half / 2, half]) {
      around.push([px + best.x + end, py + best.y]);
    }
  };
}


// Where a small step against the gradient takes the mean of v_theta; longer if it pulls harder
// -> its tip.
function draw_arrow(picture, from, { gradient, slope }) {
  const c = colors(), pull = [-slope * gradient[0], -slope * gradient[1]];
  const size = Math.hypot(...pull);
  if (size < 1e-3) return from;
  const length = (24 + 56 * Math.min(1, size)) / picture.scale_y;
  const to = [from[0] + pull[0] / size * length, from[1] + pull[1] / size * length];
  picture.line([from, to], c.green, { width: 4 });
  const angle = Math.atan2(pull[1], pull[0]), head = 11 / picture.scale_y;
  for (const turn of [2.6, -2.6]) {
    const barb = [to[0] + head * Math.cos(angle + turn), to[1] + head * Math.sin(angle + turn)];
    picture.line([to, barb], c.green, { width: 4 });
  }
  return to;
}


function draw_loss() {
  const c = colors(), { E_pos, E_neg } = chosen_step();
  const difference = E_pos[0] - E_neg[0], reach = Math.max(4, 1.2 * Math.abs(difference));
  const top = 1.15 * softplus(reach / 2);
  const picture = new Picture(element("loss"),
    { left: -reach, right: reach, bottom: 0, top, margin: { ...EVEN, below: 34 } });
  picture.line([[-reach, 0], [reach, 0]], c.grey);
  picture.line([[0, 0], [0, top]], c.line);
  picture.line([[-reach, Math.log(2)], [reach, Math.log(2)]], c.grey, { dash: [2, 4] });
  for (const [y, color, dash] of [[1, c.blue, []], [-1, c.orange, [6, 4]]]) {
    const points = Array.from({ length: 81 }, (_, i) => {
      const x = -reach + 2 * reach * i / 80;
      return [x, softplus(y * x / 2)];
    });
    picture.line(points, color, { width: state.y === y ? 3 : 1.5, dash });
  }
  const x = 0.72 * reach, height = softplus(x / 2);
  picture.text("y = −1", -x, height, c.orange, { align: "left", move: [12, 0] });
  picture.text("y = +1", x, height, c.blue, { align: "right", move: [-12, 0] });
  picture.text("ln 2: a tie", reach, Math.log(2), c.grey, { align: "right", move: [0, 11] });
  picture.text("0", 0, 0, c.grey, { align: "center", move: [0, 11] });
  picture.text("← v_pos explains it better", -reach, 0, c.grey, { move: [0, 26] });
  picture.text("v_neg →", reach, 0, c.grey, { align: "right", move: [0, 26] });
  const color = state.y === 1 ? c.blue : c.orange;
  picture.mark(difference, softplus(state.y * difference / 2), state.y === 1 ? "dot" : "square",
    color, { size: 7 });
}


// The step in words.
function tell_step() {
  const { E_pos, E_neg, loss, std, v_theta, v_old, mean } = chosen_step();
  const succeeded = state.y === 1;
  const own = played[state.acting].success[state.sample - 1] ? "arrived" : "did not arrive";
  const numbers = `E_pos = ${E_pos[0].toFixed(2)}, E_neg = ${E_neg[0].toFixed(2)}`;
  let ranking, lesson;
  if (std === 0) {
    ranking = `No noise: the step landed on its mean; both branches miss it alike (${numbers}).`;
    lesson = "The loss is ln 2 whatever the label: a step with one outcome teaches nothing.";
  } else if (Math.abs(E_pos[0] - E_neg[0]) < 1e-9) {
    ranking = `${numbers}: a tie.`;
    lesson = `The loss is ln 2 = 0.69. Its gradient (green arrow) pulls the trained velocity ` +
      `${succeeded ? "the way" : "against the way"} that the noise went.`;
  } else {
    const better = E_pos[0] < E_neg[0] ? "v_pos" : "v_neg", right = succeeded ? "v_pos" : "v_neg";
    ranking = `${numbers}: ${better} explains the step better.`;
    lesson = `The label says ${right} should, and it does${better === right ? "" : " not"}: ` +
      `loss ${loss.toFixed(2)}, ${better === right ? "below" : "above"} ln 2 = 0.69. ` +
      `The gradient (green arrow) pulls the trained velocity ` +
      `${succeeded ? "the way" : "against the way"} that the noise went, ` +
      `${better === right ? "gently" : "hard"}.`;
    if (Math.hypot(v_theta[0] - v_old[0], v_theta[1] - v_old[1]) > MAX_DRIFT) {
      lesson += ` Beyond max_drift = ${MAX_DRIFT} (hollow dot) only delta's direction counts.`;
    }
  }
  element("ranking").textContent = ranking;
  element("lesson").textContent = `${lesson} (The episode of path ${state.sample} itself ${own}.)`;
  element("gaussian").setAttribute("aria-label",
    `The Gaussian of step ${state.step} around (${mean[0].toFixed(2)}, ${mean[1].toFixed(2)}), ` +
    `std ${std.toFixed(3)}. ${ranking}`);
  element("loss").setAttribute("aria-label", `loss ${loss.toFixed(2)}`);
}


function draw_step() {
  for (const when of WHEN) draw_paths(when);
  draw_gaussian();
  draw_loss();
  tell_step();
}


function draw_all() {
  for (const when of WHEN) draw_world(when);
  draw_step();
  tell_success();
}


// -------------------------------------------------------------------------------------------------
// Controls


const SLIDERS = ["start_y", "gap_y", "noise_level", "num_steps", "sample", "step", "delta_x",
                 "delta_y"];
const REPLAYS = ["start_y", "gap_y", "noise_level", "num_steps", "corrected", "seed"];


// state -> what the controls show
function show_state() {
  const [t_cur, t_next] = time_grid(state.num_steps).slice(state.step).map((t) => t.toFixed(2));
  element("step").max = state.num_steps - 1;
  const words = {
    num_steps: state.num_steps, sample: state.sample,
    step: `${state.step}: t ${t_cur} → ${t_next}`,
  };
  for (const id of SLIDERS) {
    const text = words[id] ?? state[id].toFixed(2).replace("-", "−");
    element(id).value = state[id];
    element(id).setAttribute("aria-valuetext", text);
    document.querySelector(`output[for="${id}"]`).textContent = text;
  }
  element("corrected").checked = state.corrected;
  for (const name of ["acting", "y"]) {
    document.querySelector(`input[name="${name}"][value="${state[name]}"]`).checked = true;
  }
}


// Every change goes through here: set({ noise_level: 0.2 }). Plays again only if it must; several
// changes before the next frame are played as one.
let waiting = null;

function set(changes) {
  Object.assign(state, changes);
  state.step = Math.min(state.step, state.num_steps - 1);
  show_state();
  const must_play = REPLAYS.some((name) => name in changes);
  if (waiting) {
    waiting.must_play ||= must_play;
    return;
  }
  const frame = waiting = { must_play };
  done = new Promise((resolve) => {
    requestAnimationFrame(async () => {
      waiting = null;
      if (frame.must_play || !played.after) await replay();
      else draw_step();
      resolve();
    });
  });
}


for (const id of SLIDERS.filter((id) => id !== "sample")) {
  element(id).addEventListener("input", () => set({ [id]: Number(element(id).value) }));
}
element("sample").addEventListener("input", () => {
  choose(state.acting, Number(element("sample").value), state.step);
});
element("corrected").addEventListener("change", (event) => {
  set({ corrected: event.target.checked });
});
element("draw_again").addEventListener("click", () => set({ seed: state.seed + 1 }));
element("start_over").addEventListener("click", () => set({ ...DEFAULTS }));
for (const radio of document.querySelectorAll('input[name="acting"]')) {
  radio.addEventListener("change", () => choose(radio.value, state.sample, state.step));
}
for (const radio of document.querySelectorAll('input[name="y"]')) {
  radio.addEventListener("change", () => set({ y: Number(radio.value) }));
}
for (const form of document.forms) {
  form.addEventListener("submit", (event) => event.preventDefault());
}


// A step of another path: its label is, until one says otherwise, how its episode ended.
function choose(acting, sample, step) {
  set({ acting, sample, step, y: played[acting].success[sample - 1] ? 1 : -1 });
}


// Dragging on a canvas: grab(x, y) says with which function to go on, or null.
function draggable(canvas, grab) {
  let drag = null;
  const where = (event) => {
    const box = canvas.getBoundingClientRect();
    return pictures[canvas.id].back(event.clientX - box.left, event.clientY - box.top);
  };
  canvas.addEventListener("pointerdown", (event) => {
    drag = grab(...where(event));
    if (!drag) return;
    canvas.setPointerCapture(event.pointerId);
    drag(...where(event));
  });
  canvas.addEventListener("pointermove", (event) => {
    if (drag) drag(...where(event));
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, () => { drag = null; });
  }
  // a finger on something that can be dragged does not scroll the page
  canvas.addEventListener("touchstart", (event) => {
    if (grab(...where(event.touches[0]))) event.preventDefault();
  }, { passive: false });
}


const clip = (value, limit) => Math.min(limit, Math.max(-limit, value));
const rounded = (value) => Math.round(100 * value) / 100;

for (const when of WHEN) {
  draggable(element(`${when}_world`), (x) => {
    if (x < -0.5) return (_, y) => set({ start_y: rounded(clip(y, 0.9)) });
    if (Math.abs(x) < 0.2) return (_, y) => set({ gap_y: rounded(clip(y, 0.3)) });
    return null;
  });

  // a click chooses the step between two lines, and the path that passes nearest
  element(`${when}_paths`).addEventListener("click", (event) => {
    const [t, height] = pictures[`${when}_paths`].back(event.offsetX, event.offsetY);
    const K = state.num_steps;
    const step = Math.min(K - 1, Math.max(0, Math.floor((1 - t) * K)));
    const along = (1 - t) * K - step;
    let sample = 1, nearest = Infinity;
    for (let other = 1; other <= PATHS; other++) {
      const heights = heights_of(when, other);
      const there = heights[step] + along * (heights[step + 1] - heights[step]);
      if (Math.abs(there - height) < nearest) {
        nearest = Math.abs(there - height);
        sample = other;
      }
    }
    choose(when, sample, step);
  });
}


// the mean is affine in the velocity: where the dot is dragged to tells delta
draggable(element("gaussian"), () => (x, y) => {
  const { mean, slope } = chosen_step();
  set({ delta_x: rounded(clip((x - mean[0]) / slope, 0.75)),
        delta_y: rounded(clip((y - mean[1]) / slope, 0.75)) });
});


window.addEventListener("resize", () => { if (played.after) draw_all(); });
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw_all());


// for the tests
window.playground = {
  state, set, policies, played, timing, settled: () => done,
  load_policy, encode, velocity, denormalise, time_grid, noise_scale, transition, sde_sample,
  mirror, step_error, step_nft_loss, mean_slope, GapWorld, randn, chosen_step, pictures,
};

set({});
