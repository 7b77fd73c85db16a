// The sampler of 02 and the loss of 03, in plain JavaScript, with the names of the Python. Nothing
// is drawn here: page.js does that.
//
// Shapes as in the scripts: B batch, H actions a chunk, A action dims, K denoising steps, S state
// dims. Arrays are flat, row after row: x_t (B, H, A) is a Float64Array of B * H * A numbers.

"use strict";

const H = 4, A = 2, S = 3;
const D = H * A; // numbers in a chunk


// -------------------------------------------------------------------------------------------------
// 01: a policy is a velocity field


// The numbers of a torch state_dict, { name: { shape, float32: base64 } } -> the policy.
function load_policy(state_dict) {
  const tensor = (name) => {
    const bytes = Uint8Array.from(atob(state_dict[name].float32), (c) => c.charCodeAt(0));
    return Float64Array.from(new Float32Array(bytes.buffer));
  };
  const policy = { layers: [] };
  for (const name of ["state_centre", "state_scale", "action_centre", "action_scale"]) {
    policy[name] = tensor(name);
  }
  // in nn.Sequential every second entry is a SiLU, without weights
  for (let i = 0; `head.${i}.weight` in state_dict; i += 2) {
    const [size_out, size_in] = state_dict[`head.${i}.weight`].shape;
    const weight = tensor(`head.${i}.weight`), bias = tensor(`head.${i}.bias`);
    policy.layers.push({ size_in, size_out, weight, bias });
  }
  return policy;
}


// state (B, S) -> ctx (B, S): in the units of the demonstrations, cut at 5 std
function encode(policy, state) {
  return state.map((value, i) => {
    const unit = (value - policy.state_centre[i % S]) / policy.state_scale[i % S];
    return Math.min(5, Math.max(-5, unit));
  });
}


// outputs = inputs @ weight.T + bias, for `rows` rows. Nearly all time is spent here, so four rows
// and two outputs are done at once: what is fetched from memory is then used several times. The
// buffers have room for rows up to a multiple of four.
function linear({ size_in, size_out, weight, bias }, inputs, outputs, rows) {
  for (let row = 0; row < rows; row += 4) {
    const row_0 = row * size_in, row_1 = row_0 + size_in;
    const row_2 = row_1 + size_in, row_3 = row_2 + size_in;
    for (let out = 0; out < size_out; out += 2) {
      const out_a = out * size_in, out_b = out_a + size_in;
      let a_0 = bias[out], a_1 = a_0, a_2 = a_0, a_3 = a_0;
      let b_0 = bias[out + 1], b_1 = b_0, b_2 = b_0, b_3 = b_0;
      for (let i = 0; i < size_in; i++) {
        const w_a = weight[out_a + i], w_b = weight[out_b + i];
        const x_0 = inputs[row_0 + i], x_1 = inputs[row_1 + i];
        const x_2 = inputs[row_2 + i], x_3 = inputs[row_3 + i];
        a_0 += w_a * x_0;
        a_1 += w_a * x_1;
        a_2 += w_a * x_2;
        a_3 += w_a * x_3;
        b_0 += w_b * x_0;
        b_1 += w_b * x_1;
        b_2 += w_b * x_2;
        b_3 += w_b * x_3;
      }
      let at = row * size_out + out;
      outputs[at] = a_0;
      outputs[at + 1] = b_0;
      at += size_out;
      outputs[at] = a_1;
      outputs[at + 1] = b_1;
      at += size_out;
      outputs[at] = a_2;
      outputs[at + 1] = b_2;
      at += size_out;
      outputs[at] = a_3;
      outputs[at + 1] = b_3;
    }
  }
}


// The sigmoid at -16, -16 + 1/32, .., 16. From the nearest of them, two terms of its Taylor series
// come as close as float32 does, and three times as fast as the exponential function.
const PER_UNIT = 32, LIMIT = 16;
const SIGMOID = Float64Array.from({ length: 2 * LIMIT * PER_UNIT + 1 },
  (_, i) => 1 / (1 + Math.exp(LIMIT - i / PER_UNIT)));

// values[i] * sigmoid(values[i]), in place
function silu(values, count) {
  for (let i = 0; i < count; i++) {
    const value = values[i];
    const clipped = value < -LIMIT ? -LIMIT : value > LIMIT ? LIMIT : value;
    const nearest = (clipped + LIMIT) * PER_UNIT + 0.5 | 0;
    const d = clipped + LIMIT - nearest / PER_UNIT;
    const s = SIGMOID[nearest], slope = s * (1 - s);
    values[i] = value * (s + d * slope * (1 + d * (0.5 - s)));
  }
}


// Two buffers, made once, that the layers write to in turn.
let buffers = [new Float64Array(0), new Float64Array(0)];

function make_room(numbers) {
  if (buffers[0].length < numbers) {
    buffers = [new Float64Array(numbers), new Float64Array(numbers)];
  }
}


// x_t (B, H, A), t one number for all rows, ctx (B, S) -> velocity (B, H, A)
function velocity(policy, x_t, t, ctx) {
  const B = ctx.length / S;
  const rows = 4 * Math.ceil(B / 4);
  make_room(rows * Math.max(...policy.layers.map((layer) => layer.size_out)));
  let [inputs, outputs] = buffers;

  // a row: the chunk, 8 numbers that tell the time, the context
  const angles = [0.5, 1, 2, 4].map((turns) => t * Math.PI * turns);
  const time = [...angles.map(Math.sin), ...angles.map(Math.cos)];
  const width = D + time.length + S;
  for (let row = 0; row < B; row++) {
    const at = row * width;
    for (let i = 0; i < D; i++) inputs[at + i] = x_t[row * D + i];
    for (let i = 0; i < time.length; i++) inputs[at + D + i] = time[i];
    for (let i = 0; i < S; i++) inputs[at + D + time.length + i] = ctx[row * S + i];
  }
  policy.layers.forEach((layer, i) => {
    linear(layer, inputs, outputs, B);
    if (i < policy.layers.length - 1) silu(outputs, B * layer.size_out);
    [inputs, outputs] = [outputs, inputs];
  });
  return inputs.slice(0, B * D);
}


// flow units -> environment units
function denormalise(policy, x_0) {
  return x_0.map((value, i) => value * policy.action_scale[i % A] + policy.action_centre[i % A]);
}


// -------------------------------------------------------------------------------------------------
// 02: wider space, noise in every denoising step


// t_k = 1 - k / K for k = 0..K, from noise (1) to action (0)
function time_grid(num_steps) {
  return Array.from({ length: num_steps + 1 }, (_, k) => 1 - k / num_steps);
}


// sigma_k = a sqrt(t_k / (1 - t_k)). At t = 1, where 1 - t is 0, the next grid time replaces t.
function noise_scale(times, noise_level) {
  return times.slice(0, -1).map((t, k) => {
    const below = 1 - (t === 1 ? times[k + 1] : t);
    return noise_level * Math.sqrt(t / below);
  });
}


// Mean and std of x_next given x_t and a velocity: the one-step Gaussian.
function transition(x_t, v, t_cur, t_next, sigma, corrected = true) {
  const dt = t_cur - t_next;
  const correction = corrected ? sigma ** 2 * dt / (2 * t_cur) : 0;
  const mean = x_t.map((x, i) => {
    const x0_hat = x - t_cur * v[i];
    const x1_hat = x + (1 - t_cur) * v[i];
    return (1 - t_next) * x0_hat + (t_next - correction) * x1_hat;
  });
  return { mean, std: sigma * Math.sqrt(dt) };
}


// K noisy steps from noise to an action chunk. state (B, S); x_1 (B, H, A) and noise, K arrays of
// (B, H, A), are standard normal and given, so that a sample can be repeated
// -> x_0 (B, H, A) and the path: x, K+1 arrays; v, K arrays; sigma, K numbers.
function sde_sample(policy, state, num_steps, noise_level, x_1, noise, corrected = true) {
  const ctx = encode(policy, state), times = time_grid(num_steps);
  const sigma = noise_scale(times, noise_level);
  const path = { x: [x_1], v: [], sigma };
  let x_t = x_1;
  for (let k = 0; k < num_steps; k++) {
    const v = velocity(policy, x_t, times[k], ctx);
    const { mean, std } = transition(x_t, v, times[k], times[k + 1], sigma[k], corrected);
    x_t = mean.map((value, i) => value + std * noise[k][i]);
    path.x.push(x_t);
    path.v.push(v);
  }
  return { x_0: x_t, path };
}


// -------------------------------------------------------------------------------------------------
// 03: finer steps, the loss of one denoising step. Arrays are (H, A): the step of one chunk.


const VAR_EPS = 1e-4;


// Two velocities at equal distance from v_old, one towards v_theta, one away. A longer delta than
// max_drift, per action, is shortened first.
function mirror(v_theta, v_old, beta, max_drift) {
  const v_pos = v_old.slice(), v_neg = v_old.slice();
  for (let h = 0; h < v_old.length; h += A) {
    const delta = [v_theta[h] - v_old[h], v_theta[h + 1] - v_old[h + 1]];
    const scale = max_drift / Math.max(Math.hypot(...delta), max_drift);
    for (let i = 0; i < A; i++) {
      v_pos[h + i] += beta * delta[i] * scale;
      v_neg[h + i] -= beta * delta[i] * scale;
    }
  }
  return { v_pos, v_neg };
}


// E(v) for each action: how badly a velocity explains a step x_t -> x_next
function step_error(v, x_t, x_next, t_cur, t_next, sigma, corrected = true) {
  const { mean, std } = transition(x_t, v, t_cur, t_next, sigma, corrected);
  const E = new Float64Array(v.length / A);
  for (let i = 0; i < v.length; i++) {
    E[Math.floor(i / A)] += (x_next[i] - mean[i]) ** 2 / (std ** 2 + VAR_EPS);
  }
  return E;
}


function softplus(z) {
  return Math.max(z, 0) + Math.log1p(Math.exp(-Math.abs(z)));
}


// The loss of one step, mean over its actions, and its gradient with respect to v_theta (torch has
// autograd for that). step: { v_theta, v_old, x_t, x_next, t_cur, t_next, sigma, corrected, y }
function step_nft_loss(step, { beta = 1, max_drift = 0.5, dpo_beta = 1, kl_weight = 1e-4 } = {}) {
  const { v_theta, v_old, x_t, x_next, t_cur, t_next, sigma, corrected = true, y } = step;
  const where = [t_cur, t_next, sigma, corrected];
  const { v_pos, v_neg } = mirror(v_theta, v_old, beta, max_drift);
  const E_pos = step_error(v_pos, x_t, x_next, ...where);
  const E_neg = step_error(v_neg, x_t, x_next, ...where);
  const { mean: mean_pos, std } = transition(x_t, v_pos, ...where);
  const { mean: mean_neg } = transition(x_t, v_neg, ...where);
  const slope = mean_slope(...where);
  const actions = v_old.length / A;

  let loss = 0;
  const gradient = new Float64Array(v_old.length);
  for (let h = 0; h < actions; h++) {
    const z = dpo_beta / 2 * y * (E_pos[h] - E_neg[h]);
    const delta = [0, 1].map((i) => v_theta[h * A + i] - v_old[h * A + i]);
    const pull = (delta[0] ** 2 + delta[1] ** 2) / A;
    loss += (softplus(z) + kl_weight * pull) / actions;

    // through both means to the shortened delta; softplus' slope is 1 / (1 + exp(-z))
    const weight = dpo_beta / 2 * y / (1 + Math.exp(-z));
    const to_delta = [0, 1].map((i) => {
      const miss_pos = x_next[h * A + i] - mean_pos[h * A + i];
      const miss_neg = x_next[h * A + i] - mean_neg[h * A + i];
      return weight * -2 * slope * beta * (miss_pos + miss_neg) / (std ** 2 + VAR_EPS);
    });
    // where delta was shortened, only its direction still counts
    const norm = Math.hypot(...delta);
    if (norm > max_drift) {
      const along = (to_delta[0] * delta[0] + to_delta[1] * delta[1]) / norm ** 2;
      for (let i = 0; i < A; i++) {
        to_delta[i] = (to_delta[i] - along * delta[i]) * max_drift / norm;
      }
    }
    for (let i = 0; i < A; i++) {
      gradient[h * A + i] = (to_delta[i] + kl_weight * 2 * delta[i] / A) / actions;
    }
  }
  return { loss, gradient, E_pos, E_neg, v_pos, v_neg };
}


// The mean is affine in the velocity. This is its slope, a negative number: towards t = 0 one goes
// against the velocity.
function mean_slope(t_cur, t_next, sigma, corrected = true) {
  const at = (v) => transition([0], [v], t_cur, t_next, sigma, corrected).mean[0];
  return at(1) - at(0);
}


// -------------------------------------------------------------------------------------------------
// The world of envs/gap_world.py


class GapWorld {
  static gap = 0.06;          // half of its height
  static goal = [0.8, 0];
  static goal_radius = 0.08;
  static start_x = -0.8;
  static speed = 0.15;        // longest move
  static max_steps = 24;      // time limit

  // y, gap_y: an entry for each episode. Plays all of them to their end.
  // act(state (n, S), episodes, how many chunks they have had) -> chunks (n, H, A), where
  // `episodes` are the n that still play
  // -> success, an entry for each; trail, its positions one after the other, x and y in turn
  static play(act, y, gap_y) {
    const count = y.length;
    const success = Array(count).fill(false);
    const trail = Array.from(y, (height) => [GapWorld.start_x, height]);
    let playing = Array.from(y, (_, episode) => episode);
    for (let chunk = 0; playing.length > 0; chunk++) {
      const state = new Float64Array(playing.length * S);
      playing.forEach((episode, row) => {
        state.set([...trail[episode].slice(-2), gap_y[episode]], row * S);
      });
      const actions = act(state, playing, chunk);
      playing = playing.filter((episode, row) => {
        for (let h = 0; h < H; h++) {
          const at = (row * H + h) * A;
          const action = [actions[at], actions[at + 1]];
          const end = GapWorld.move(trail[episode], action, gap_y[episode]);
          success[episode] = end === "arrived";
          if (end) return false;
        }
        return true;
      });
    }
    return { success, trail };
  }

  // One action of one episode: lengthens its trail -> how it ended, or "" if it goes on.
  static move(trail, action, gap_y) {
    const clip = (value) => Math.min(1, Math.max(-1, value));
    const [x_old, y_old] = trail.slice(-2);
    let x = clip(x_old + GapWorld.speed * clip(action[0]));
    let y = clip(y_old + GapWorld.speed * clip(action[1]));
    let crashed = false;
    if ((x_old < 0) !== (x < 0)) {            // the move meets the wall at x = 0
      const along = -x_old / (x - x_old);
      const y_wall = y_old + along * (y - y_old);
      crashed = Math.abs(y_wall - gap_y) > GapWorld.gap;
      if (crashed) [x, y] = [0, y_wall];
    }
    trail.push(x, y);
    const to_goal = Math.hypot(x - GapWorld.goal[0], y - GapWorld.goal[1]);
    if (to_goal < GapWorld.goal_radius) return "arrived";
    if (crashed) return "crashed";
    return trail.length / 2 > GapWorld.max_steps ? "too late" : "";
  }
}


// -------------------------------------------------------------------------------------------------
// Noise that can be drawn again: the same seed, the same numbers


// count standard normal numbers. (mulberry32 makes uniform ones, Box and Muller normal ones.)
function randn(seed, count) {
  let counter = seed * 0x9e3779b9 | 0;
  const uniform = () => {
    counter = counter + 0x6d2b79f5 | 0;
    let bits = Math.imul(counter ^ counter >>> 15, 1 | counter);
    bits = bits + Math.imul(bits ^ bits >>> 7, 61 | bits) ^ bits;
    return ((bits ^ bits >>> 14) >>> 0) / 2 ** 32;
  };
  const numbers = new Float64Array(count);
  for (let i = 0; i < count; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(1 - uniform()));
    const angle = 2 * Math.PI * uniform();
    numbers[i] = radius * Math.cos(angle);
    if (i + 1 < count) numbers[i + 1] = radius * Math.sin(angle);
  }
  return numbers;
}
