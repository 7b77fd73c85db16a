"""envs/libero_demos.py: files as people have them. What is wrong with one is told in a line that
names the file, the cause and what to do; what can be read is read."""

import fcntl
import json
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from envs import libero, libero_demos
from envs.workers import tokens
from test_envs_libero import SOUP, EchoSim, echoing, write_demos
from test_envs_libero import cabinet, recorded, soup  # noqa: F401 (fixtures)

sim = pytest.mark.sim
FETCH, OWN = "fetch it again", "give LIBERO's own files"
patched = pytest.MonkeyPatch.context  # ends before `echoing`, around it, does


def read(path, obs="rgb", tasks=(0,), num_demos=3, **more):
    return libero_demos.recorded_demos("libero_object", tasks, path, num_demos, False, obs, **more)


def refused(path, obs="rgb", tasks=(0,), **more):
    """The line with which a file is refused; it names the file."""
    with pytest.raises(SystemExit) as stopped:
        read(path, obs, tasks, **more)
    line = str(stopped.value)
    assert "\n" not in line and str(path) in line
    return line


def rename(content, old, new):
    content.move(old, new)


def replace(content, key, values):
    del content[key]
    content[key] = values


def made_anew(content):
    """What OpenVLA's script leaves of a file's attributes."""
    del content["data"].attrs["problem_info"]
    for demo in content["data"].values():
        del demo.attrs["model_file"]


# ------------------------------------------------------------------------------------------------
# Files that are refused


@pytest.mark.parametrize("spoil, words", [
    (lambda file: rename(file, "data", "demos"), ["no group 'data'", "demos", OWN]),
    (lambda file: replace(file, "data", [1.0]), ["no group 'data'", OWN]),
    (lambda file: rename(file, "data/demo_0", "data/episode_0"),
     ["no demos", "episode_0", "demo_1"]),
    (lambda file: file.__delitem__("data/demo_0"), ["no demos", "nothing"]),
    (lambda file: rename(file, "data/demo_0/actions", "data/demo_0/action"),
     ["demo_0 has no actions", "action, obs, states", OWN]),
    (lambda file: rename(file, "data/demo_0/obs/agentview_rgb", "data/demo_0/obs/agentview_image"),
     ["demo_0 has no obs/agentview_rgb", "agentview_image, eye_in_hand_rgb", OWN]),
    (lambda file: replace(file, "data/demo_0/states", np.zeros((7, 19))),
     ["8 actions and 7 states", FETCH]),
    (lambda file: replace(file, "data/demo_0/obs/agentview_rgb", np.zeros((7, 4, 4, 3), "u1")),
     ["8 actions and 7 obs/agentview_rgb", FETCH]),
    (lambda file: [replace(file, f"data/demo_0/{key}", np.zeros((0, n))) for key, n in
                   (("actions", 7), ("states", 19))], ["0 actions", FETCH]),
    (lambda file: replace(file, "data/demo_0/actions", np.zeros((8, 14))),
     ["actions of shape (8, 14)", "7 numbers"]),
    (lambda file: replace(file, "data/demo_0/actions", np.full((8, 7), np.nan)),
     ["not finite", FETCH]),
    (lambda file: replace(file, "data/demo_0/obs/agentview_rgb", np.zeros((8, 4, 6, 3), "u1")),
     ["(8, 4, 6, 3)", "not squares", "--obs state"]),
    (lambda file: replace(file, "data/demo_0/obs/eye_in_hand_rgb", np.zeros((8, 6, 6, 3), "u1")),
     ["(8, 4, 4, 3)", "(8, 6, 6, 3)", "not squares of one size"]),
    (lambda file: replace(file, "data/demo_0/obs/agentview_rgb", np.zeros((8, 3, 4, 4), "u1")),
     ["(8, 3, 4, 4)", "(steps, height, width, 3)", OWN]),
    (lambda file: replace(file, "data/demo_0/obs/agentview_rgb", np.zeros((8, 4, 4, 3), "f4")),
     ["float32", "uint8", OWN])])
def test_what_is_wrong_inside_a_file_is_named(spoil, words):
    with echoing() as folder:
        write_demos(folder / SOUP, [0])
        with h5py.File(folder / SOUP, "a") as content:
            spoil(content)
        line = refused(folder / SOUP)
    assert all(word in line for word in words), line
    assert (FETCH in line) == (FETCH in words), line


def test_a_file_that_another_program_writes_is_locked_and_not_broken():
    with echoing() as folder:
        write_demos(folder / SOUP, [0])
        with open(folder / SOUP, "rb+") as writer:
            fcntl.flock(writer, fcntl.LOCK_EX)
            line = refused(folder / SOUP)
        assert "is locked" in line and "HDF5_USE_FILE_LOCKING" in line and FETCH not in line
        assert len(read(folder / SOUP)) == 1


@pytest.mark.parametrize("raised, words", [
    (PermissionError(13, "Permission denied"), ["Permission denied", "owner"]),
    (OSError("unable to lock file, errno = 38"), ["is locked", "HDF5_USE_FILE_LOCKING"]),
    (OSError("truncated file: eof = 4"), ["no complete HDF5 file", "truncated", FETCH])])
def test_a_file_that_cannot_be_opened_is_told_by_its_cause(raised, words, monkeypatch):
    def fails(*args, **more):
        raise raised

    with echoing() as folder:
        write_demos(folder / SOUP, [0])
        monkeypatch.setattr(h5py, "File", fails)
        line = refused(folder / SOUP)
    assert all(word in line for word in words), line


def test_a_pointer_of_git_lfs_and_a_folder_with_the_name_of_a_file():
    with echoing() as folder:
        (folder / SOUP).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        assert "git lfs pull" in refused(folder / SOUP)
        (folder / SOUP).unlink()
        (folder / SOUP).mkdir()
        with pytest.raises(SystemExit, match=SOUP):
            read(folder)


def test_a_file_that_breaks_off_while_it_is_read():
    """Its table of contents is whole, its actions are not."""
    with echoing() as folder:
        write_demos(folder / SOUP, [0])
        with h5py.File(folder / SOUP, "a") as content:
            values = np.random.default_rng(0).normal(size=(8, 7))
            del content["data/demo_0/actions"]
            kept = content["data/demo_0"].create_dataset("actions", data=values, compression="gzip")
            place = kept.id.get_chunk_info(0).byte_offset
        with open(folder / SOUP, "rb+") as file:
            file.seek(place)
            file.write(bytes(40))
        line = refused(folder / SOUP, "state")
    assert "no complete HDF5 file" in line and FETCH in line


def test_all_files_are_looked_at_before_any_is_replayed():
    with echoing() as folder, patched() as patch:
        other = libero.read_suite("libero_object").tasks.get_task(3).name + "_demo.hdf5"
        write_demos(folder / SOUP, [0])
        (folder / other).write_bytes(b"half")
        patch.setattr(libero_demos, "LiberoSim", None)
        with pytest.raises(SystemExit, match=f"{other} is no complete HDF5 file"):
            read(folder, tasks=(0, 3))


# ------------------------------------------------------------------------------------------------
# The simulator's errors are its own


@pytest.mark.parametrize("error", [OSError("no such mesh"), KeyError("body"), ValueError("nan")])
def test_an_error_of_the_simulator_is_not_said_to_be_the_files(error, monkeypatch):
    def fails(*args):
        raise error

    with echoing() as folder:
        write_demos(folder / SOUP, [0])
        monkeypatch.setattr(EchoSim, "replay", fails)
        with pytest.raises(type(error)) as raised:
            read(folder)
        assert raised.value is error
        monkeypatch.setattr(EchoSim, "__init__", fails)
        with pytest.raises(type(error)) as raised:
            read(folder)
        assert raised.value is error


def test_a_simulator_that_dies_is_one_line():
    class Dies:
        def __init__(self, *args, **more):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *what):
            pass

        def submit(self, *args):
            def result():
                raise BrokenProcessPool
            return SimpleNamespace(result=result)

    with echoing() as folder, patched() as patch:
        write_demos(folder / SOUP, [0])
        patch.setattr(libero_demos.concurrent.futures, "ProcessPoolExecutor", Dies)
        assert "memory" in refused(folder / SOUP)


def test_states_of_another_task_are_told():
    model = SimpleNamespace(nq=50, nv=41)
    for states, model_file, words in ((np.zeros((3, 77)), None, "states of 77 numbers, .* has 92"),
                                      (np.zeros((3, 92)), "no xml", "model_file that is no XML")):
        with pytest.raises(libero.OtherTask, match=words):
            libero.LiberoSim.replay(SimpleNamespace(model=model), states, model_file)


def test_a_replay_of_another_tasks_states_names_file_demo_and_task(monkeypatch):
    def other(*args):
        raise libero.OtherTask("states of 77 numbers, the task has 92")

    with echoing() as folder:
        write_demos(folder / SOUP, [0])
        monkeypatch.setattr(EchoSim, "replay", other)
        line = refused(folder / SOUP)
    assert "states of 77 numbers, the task has 92 in demo_0" in line
    assert "task 0 of --suite libero_object" in line and FETCH not in line


# ------------------------------------------------------------------------------------------------
# Files that are read


@pytest.mark.parametrize("name", ["demo{}", "demo_{}", "demo_{:03d}"])
def test_groups_are_read_in_the_order_of_their_numbers_however_they_are_written(name):
    with echoing() as folder:
        write_demos(folder / SOUP, [10, 9, 1])
        with h5py.File(folder / SOUP, "a") as content:
            for number in (10, 9, 1):
                content.move(f"data/demo_{number}", "data/aside")
                content.move("data/aside", "data/" + name.format(number))
            content["data/mask"] = [1, 2]                              # is no demo
        demos = read(folder)
    assert [int(rows["state"][0, 0]) for rows, _ in demos] == [1, 9, 10]


class AnewSim(EchoSim):
    """Replays without a model_file; these of its things stand on what is drawn."""

    drawn = []

    def drawn_fixtures(self):
        return self.drawn

    def replay(self, states, model_file):
        assert model_file is None
        return states[:, 1:]


def test_files_made_anew_hold_each_image_beside_its_own_state():
    with echoing() as folder, patched() as patch:
        patch.setattr(libero_demos, "LiberoSim", AnewSim)
        patch.setattr(AnewSim, "drawn", ["wooden_cabinet_1"])     # images do not ask
        write_demos(folder / SOUP, [0])
        with h5py.File(folder / SOUP, "a") as content:
            made_anew(content)
            images = content["data/demo_0/obs/agentview_rgb"][:]
        (rows, _), = read(folder)
    assert rows["state"][:, 1].tolist() == [1, 2, 3, 4, 5, 6, 7]
    for row, step in enumerate(range(1, 8)):
        assert np.array_equal(rows["rgb"][row, 0], np.rot90(images[step], 2).transpose(2, 0, 1))


def test_poses_without_a_model_file_are_read_if_no_fixture_is_asked_for():
    with echoing() as folder, patched() as patch:
        patch.setattr(libero_demos, "LiberoSim", AnewSim)
        write_demos(folder / SOUP, [0])
        with h5py.File(folder / SOUP, "a") as content:
            made_anew(content)
        (rows, _), = read(folder, "state")
        assert rows["state"][:, 1].tolist() == list(range(8))
        patch.setattr(AnewSim, "drawn", ["wooden_cabinet_1"])
        line = refused(folder / SOUP, "state")
    assert all(word in line for word in ("model_file", "wooden_cabinet_1", "--obs rgb"))


def test_a_file_that_does_not_say_what_it_shows_must_have_the_tasks_name():
    with echoing() as folder:
        for info in (None, "no json", json.dumps({"language": "x"})):
            write_demos(folder / SOUP, [0])
            with h5py.File(folder / SOUP, "a") as content:
                del content["data"].attrs["problem_info"]
                if info:
                    content["data"].attrs["problem_info"] = info
            assert len(read(folder / SOUP)) == 1
            (folder / SOUP).rename(folder / "demos.hdf5")
            line = refused(folder / "demos.hdf5")
            assert "does not say what it shows" in line and f"call it {SOUP}" in line


def test_demos_are_told_the_sentence_that_the_policy_was_trained_with():
    with echoing() as folder:
        write_demos(folder / SOUP, [0])
        for published, wanted in ((False, "pick the alphabet soup and place it in the basket"),
                                  (True, "pick up the alphabet soup and place it in the basket")):
            (rows, _), = read(folder, published=published)
            assert (rows["tokens"].numpy() == tokens(wanted)).all()


# ------------------------------------------------------------------------------------------------
# In the simulator


@sim
def test_real_poses_without_a_model_file(recorded, tmp_path):  # noqa: F811
    """libero_object has no fixture but the floor, so a file made anew gives the very states."""
    file, seen = recorded
    (tmp_path / SOUP).write_bytes(file.read_bytes())
    with h5py.File(tmp_path / SOUP, "a") as content:
        made_anew(content)
    demos = read(tmp_path, "state")
    assert len(demos) == 2
    states = np.concatenate([rows["state"] for rows, _ in demos])
    np.testing.assert_allclose(states, seen, atol=2e-3)


@sim
def test_which_things_stand_on_what_is_drawn_anew(soup, cabinet):  # noqa: F811
    assert soup.drawn_fixtures() == []
    # of libero_goal's task 4 the bowl has joints of its own, the cabinet's top stands with it
    bowl, top = cabinet.entities
    assert "bowl" in bowl and cabinet.drawn_fixtures() == [top]


@sim
def test_states_of_another_real_task_are_refused(recorded, tmp_path):  # noqa: F811
    file, _ = recorded
    (tmp_path / SOUP).write_bytes(file.read_bytes())
    with h5py.File(tmp_path / SOUP, "a") as content:
        for demo in content["data"].values():
            replace(demo, "states", np.column_stack([demo["states"][:], np.zeros(12)]))
    assert "numbers, the task has" in refused(tmp_path / SOUP, "state")


def test_the_sentences_of_the_suites():
    """In 25 of the 40 tasks the BDDL file has another one; LIBERO-PRO's variants have no other."""
    differ = 0
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
        tasks, _, problems = libero.read_suite(suite)
        for task, problem in enumerate(problems):
            own, published = (libero.sentence(suite, task, yes) for yes in (False, True))
            assert own == problem.instruction and published == tasks.get_task(task).language
            differ += own.lower() != published.lower()
            assert not published.startswith(("KITCHEN", "LIVING", "STUDY"))
    assert differ == 25
    for suite in ("libero_object_lan", "libero_goal_swap", "libero_spatial_task"):
        for task, problem in enumerate(libero.read_suite(suite).problems):
            assert libero.sentence(suite, task, published=True) == problem.instruction


def test_simulators_tell_the_sentence_that_the_policy_was_trained_with(monkeypatch):
    class Sim:
        instruction = "pick the alphabet soup and place it in the basket"

        def __init__(self, suite, task):
            pass

        def reset(self, number):
            pass

        def observe(self):
            return {}

    monkeypatch.setattr(libero, "LiberoSim", Sim)
    for published, wanted in ((False, Sim.instruction),
                              (True, "pick up the alphabet soup and place it in the basket")):
        sims = libero.TaskSims("libero_object", published=published)
        sims.reset(1007)
        assert np.array_equal(sims.observe()["tokens"], tokens(wanted))
    told = libero.make_workers  # what 04 says reaches them
    monkeypatch.setattr(libero, "Workers", lambda make_env, *rest: make_env())
    env = told("libero_object", [0], 1, published=True)
    assert env.make_sim.keywords["published"] is True
