"""Many simulators side by side, one per process: the world that 04 and 05 play in.

    Workers(make_env, num_envs).play(act, seeds) -> (success (episodes,) bool, rows)

as GapWorld.play. A simulator joins as a gymnasium.Env with four habits: its action is a
whole chunk (H, A), its observation a dict of arrays; step's info tells `executed`, how many of the
H actions ran before the episode ended, and `success`; a seed is an episode: the same start in any
process, after any other episode; and while it has no episode to play, reset() without a seed and
step() after the end do no harm (nobody reads the answers). ChunkEnv gives these
habits to anything that can reset, move by one action and look.
"""

import functools
import itertools
import math
import multiprocessing
import signal
from multiprocessing import connection
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from tqdm import tqdm


def tokens(sentence):
    """A sentence as the bytes of its small letters, (128,) uint8: unseen words are no error."""
    return np.frombuffer(sentence.lower().encode()[:128].ljust(128), np.uint8)


class ChunkEnv(gym.Env):
    """One simulator as a gymnasium.Env whose action is a chunk (H, A), observed once at its end.

    make_sim(**changes) -> sim with reset(seed), advance(action (A,)) -> success, observe() -> dict
    of arrays. It is called at the first reset, so that only worker processes ever load a simulator.
    Each action is held for action_repeat control steps; max_steps, the time limit, counts those.
    film: a folder for an mp4 of each episode, of look() -> (height, width, 3) uint8 and name.
    """

    def __init__(self, make_sim, observation_space, action_dim, max_steps, horizon,
                 action_repeat=1, film=None):
        if multiprocessing.parent_process():  # Ctrl-C is for the script, which ends its workers
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.make_sim, self.sim, self.film = make_sim, None, film
        self.max_steps, self.action_repeat = max_steps, action_repeat
        self.observation_space = observation_space
        self.action_space = gym.spaces.Box(-1, 1, (horizon, action_dim))
        self.steps, self.over = 0, True
        self.obs = {name: np.zeros(box.shape, box.dtype)  # shown while there is no episode to play
                    for name, box in observation_space.items()}

    def change(self, **changes):
        """From the next reset on, a new simulator, made with these keywords as well."""
        if hasattr(self.sim, "close"):
            self.sim.close()
        self.make_sim, self.sim = functools.partial(self.make_sim, **changes), None

    def reset(self, *, seed=None, options=None):
        if seed is None:  # no episode to play yet
            return self.obs, {}
        if self.sim is None:
            torch.set_num_threads(1)  # a process for each core: threads would fight over them
            self.sim = self.make_sim()
        self.sim.reset(seed)
        self.frames = []
        self.steps, self.over, self.obs = 0, False, self.sim.observe()
        return self.obs, {}

    def step(self, chunk):
        """Stops inside the chunk at success or at the time limit; does nothing once it is over."""
        taken, success = 0, False  # taken: control steps of this chunk
        for action in np.repeat(chunk, self.action_repeat, axis=0):
            if self.over:
                break
            success = bool(self.sim.advance(action))
            taken += 1
            self.steps += 1
            self.over = success or self.steps >= self.max_steps
            if self.film:
                self.shoot(success)
        if taken:
            self.obs = self.sim.observe()
        info = {"executed": math.ceil(taken / self.action_repeat), "success": success}
        return self.obs, float(success), success, self.over and not success, info

    def shoot(self, success):
        """Adds a picture to the film, and writes it at the end of the episode."""
        import imageio
        self.frames.append(self.sim.look())
        if self.over:
            Path(self.film).mkdir(parents=True, exist_ok=True)
            name = f"{self.sim.name}_{'success' if success else 'failure'}.mp4"
            imageio.mimwrite(Path(self.film) / name, self.frames, fps=20)


def processes(make_env, num_envs):
    """A process for each simulator; SystemExit in one line if the system has not so many."""
    try:
        return gym.vector.AsyncVectorEnv([make_env] * num_envs, context="spawn",
                                         autoreset_mode=gym.vector.AutoresetMode.DISABLED)
    except OSError as error:  # each takes pipes, and shared memory for what it observes
        raise SystemExit(f"--num-envs {num_envs}: the system refused so many simulators "
                         f"({error.strerror}); give fewer, or raise `ulimit -n` and the room in "
                         "/dev/shm") from None


class Workers:
    """num_envs simulators in a process each; make_env() -> gymnasium.Env, called in each of them.

    plays(slot, seed) says whether a process may take an episode, so that a task can stay where its
    simulator already is; name(seed) is what to call an episode whose process has died. envs: what
    answers in the processes' place, as maniskill_gpu's Scenes do; then make_env is None.
    """

    def __init__(self, make_env, num_envs, plays=lambda slot, seed: True, name=str, envs=None):
        self.num_envs, self.plays, self.name = num_envs, plays, name
        self.envs = envs or processes(make_env, num_envs)
        self.ask([-1] * num_envs, [], self.envs.reset)  # every process has something to show

    def play(self, act, seeds):
        """Plays one episode per seed -> (success (episodes,) bool, rows). See GapWorld.play.

        All processes take a step together; one whose episode ends takes the next seed at once.
        Deterministic for given seeds, policy and number of processes; rows is {} without seeds.
        """
        seeds, rows = [int(seed) for seed in seeds], []
        success, waiting = np.zeros(len(seeds), bool), list(range(len(seeds)))
        episode = np.full(self.num_envs, -1)     # which episode each process plays; -1: none
        bar = tqdm(total=len(seeds), desc="episodes", disable=None, leave=False)
        while True:
            fresh = np.zeros(self.num_envs, bool)
            for slot in np.flatnonzero(episode < 0):
                own = next((e for e in waiting if self.plays(slot, seeds[e])), None)
                if own is not None:
                    waiting.remove(own)
                    episode[slot], fresh[slot] = own, True
            if (episode < 0).all():
                break
            if fresh.any():  # gymnasium wants a seed for the processes it leaves alone, too
                slot_seeds = [seeds[e] if e >= 0 else 0 for e in episode]
                obs = self.ask(episode, seeds, lambda: self.envs.reset(
                    seed=slot_seeds, options={"reset_mask": fresh}))[0]
            obs = {name: torch.as_tensor(values) for name, values in obs.items()}
            actions, record = act(obs)
            next_obs, _, terminated, truncated, info = self.ask(
                episode, seeds, lambda: self.envs.step(actions.numpy()))
            playing = torch.from_numpy(np.flatnonzero(episode >= 0))
            mask = torch.arange(actions.shape[1]) < torch.as_tensor(info["executed"])[:, None]
            row = {**record, **obs, "episode": torch.from_numpy(episode), "mask": mask}
            rows.append({name: values[playing] for name, values in row.items()})
            over = (terminated | truncated) & (episode >= 0)
            success[episode[over]] = info["success"][over]
            bar.update(int(over.sum()))
            episode[over] = -1
            obs = next_obs
        bar.close()
        assert not waiting, f"no process may play {self.name(seeds[waiting[0]])}"
        return success, {name: torch.cat([row[name] for row in rows]) for name in (rows or [{}])[0]}

    def ask(self, episode, seeds, question):
        """The processes' answer; one that has died ends the run in one line that names its start.

        Returns question(). Checkpoints are written whole, so the last one is never harmed.
        """
        try:
            return question()
        except (EOFError, ConnectionError):
            if not hasattr(self.envs, "processes"):
                raise
            # a pipe breaks a moment before its process is known to be dead: wait for that
            gone = connection.wait([process.sentinel for process in self.envs.processes], 10)
            dead = [self.name(seeds[e]) for e, process in zip(episode, self.envs.processes)
                    if e >= 0 and process.sentinel in gone]
            for process in self.envs.processes:
                process.kill()
            self.envs.closed = True  # there is nobody left to say goodbye to
            raise SystemExit("a simulator process died (out of memory? try a smaller --num-envs) "
                             f"while playing {', '.join(dead) or 'no episode'}; a run that has "
                             "saved last.pt goes on with --resume") from None

    def change(self, **keywords):
        """ChunkEnv.change in every process."""
        self.ask([-1] * self.num_envs, [], lambda: self.envs.call("change", **keywords))

    def close(self):
        self.envs.close()


def follow_expert(obs):
    """An `act`: the scripted expert's action, which the observation holds, as a chunk of one."""
    return obs["action"][:, None], {}


def scripted_demos(world, candidates, num_demos):
    """The expert's first num_demos successes in each task -> [(rows, actions (T, A)), ...].

    candidates: for each task, the seeds to try in this order. The world observes the expert's
    action, and is closed at the end.
    """
    demos, missing = [], {task: num_demos for task in range(len(candidates))}
    candidates = [iter(seeds) for seeds in candidates]
    while missing:
        tries = [(task, seed) for task, n in missing.items()
                 for seed in itertools.islice(candidates[task], n)]
        if not tries:
            raise SystemExit(f"--num-demos {num_demos}: the expert failed too often; use less "
                             "--demo-noise or more --max-steps")
        success, rows = world.play(follow_expert, [seed for _, seed in tries])
        episode, _ = rows.pop("episode"), rows.pop("mask")  # what is left was observed
        for e in np.flatnonzero(success):
            demo = {name: values[episode == e] for name, values in rows.items()}
            demos.append((demo, demo.pop("action")))
            missing[tries[e][0]] -= 1
        missing = {task: n for task, n in missing.items() if n}
    world.close()
    return demos
