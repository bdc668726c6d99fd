"""A checkpoint brings back the bits that were saved; a damaged one is named, and nothing good is lost."""

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_loop import assert_same_bits, lenient

from jprob import mle
from jprob.mle import checkpoint, fit
from jprob.mle.checkpoint import Saved, latest, opened, save

host = sys.modules["jprob.mle.fit"]

ROOT = Path(__file__).parent.parent
KEY = jax.random.key(3)
RUN = {"version": 1}


class Layer(NamedTuple):
    kernel: Any
    bias: Any


AWKWARD = {
    "a/b.c['d']": Layer(jnp.array([[jnp.nan, -0.0], [jnp.inf, 1e-45]]), None),
    "low": [jnp.array([1.5, -2.25], jnp.bfloat16), jnp.array([0.1], jnp.float16)],
    "empty": (jnp.zeros((0, 3)), ()),
    "scalars": (jnp.array(True), jnp.array(7, jnp.uint8), jnp.array(-(2**31), jnp.int32)),
    "keys": (jax.random.split(jax.random.key(1), 3), jax.random.key(2, impl="rbg")),
}


def history(length, scores=()):
    rows = np.arange(length, dtype=np.float32)
    return mle.History(
        rows, rows, rows, rows.astype(np.int32), {"a/b": rows * np.nan}, np.array(scores), {"c": np.array(scores)}
    )


def saved(step=10, scores=(), params=AWKWARD):
    state = mle.init({}, optax.identity(), KEY)._replace(params=params, step=jnp.array(step, jnp.int32))
    return Saved(step, state, history(step, scores), {"number": [step]})


def names(folder):
    return {path.name for path in folder.iterdir()} - {".lock"}


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("step", [0, 10], ids=["empty history", "history"])
def test_what_is_saved_comes_back_bit_for_bit(step, tmp_path):
    want = saved(step)
    with opened(tmp_path, RUN, 3) as store:
        assert latest(store, want.state) is None
        save(store, want)
    with opened(tmp_path, RUN, 3) as store:
        got = latest(store, jax.tree.map(lambda x: x, want.state))
    assert (got.step, got.position) == (step, {"number": [step]})
    assert_same_bits(got.state, want.state)
    assert_same_bits(got.history, want.history)
    assert jax.tree.structure(got.state) == jax.tree.structure(want.state)


def test_arrays_come_back_to_the_devices_of_the_template(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread, copied = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), ()))
    params = {"spread": jax.device_put(jnp.arange(16.0), spread), "free": jnp.arange(3.0)}
    params["second"] = jax.device_put(jnp.arange(2.0), jax.devices()[1])
    want = saved(params=params)
    with opened(tmp_path, RUN, 3) as store:
        save(store, want)
        got = latest(store, want.state).state.params
        assert_same_bits(got, params)
        assert {name: x.sharding for name, x in got.items()} == {name: x.sharding for name, x in params.items()}
        assert {name: x.committed for name, x in got.items()} == {"spread": True, "free": False, "second": True}
        template = saved(params=params | {"spread": jax.device_put(jnp.zeros(16), copied)})
        assert latest(store, template.state).state.params["spread"].sharding == copied


def test_the_last_are_kept(tmp_path):
    with opened(tmp_path, RUN, 2) as store:
        for step in range(4):
            save(store, saved(step))
    assert names(tmp_path) == {"2", "3"}


def damaged(path, how):
    content = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "flip":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    else:
        path.write_bytes(content[: len(content) // 2] if how == "truncate" else b"")


@pytest.mark.parametrize("how", ["empty", "truncate", "delete", "flip"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(how, tmp_path, capfd):
    """Whichever of its files it is."""
    with opened(tmp_path / "run", RUN, 3) as store:
        for step in (10, 20):
            save(store, saved(step))
    files = [path.relative_to(tmp_path / "run") for path in (tmp_path / "run/20").rglob("*") if path.is_file()]
    assert len(files) > 10
    for name in files:
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        damaged(tmp_path / "copy" / name, how)
        with opened(tmp_path / "copy", RUN, 3) as store:
            got = latest(store, saved().state)
            assert got.step == 10
            assert_same_bits(got.state, saved(10).state)
            assert re.fullmatch(rf"fit: checkpoint {tmp_path}/copy/20 cannot be read: .+\n", capfd.readouterr().err)
            save(store, saved(15))  # and it no longer counts among those to keep
            assert names(tmp_path / "copy") == {"10", "15"}
        shutil.rmtree(tmp_path / "copy")


def test_an_older_one_that_cannot_be_read_is_named_as_the_folder_is_opened(tmp_path, capfd):
    with opened(tmp_path, RUN, 3) as store:
        for step in (10, 20):
            save(store, saved(step))
    damaged(tmp_path / "10/description.json", "truncate")
    with opened(tmp_path, RUN, 3) as store:
        assert latest(store, saved().state).step == 20
    assert re.fullmatch(rf"fit: checkpoint {tmp_path}/10 cannot be read: .+\n", capfd.readouterr().err)


def test_the_newest_one_emptied_is_named(tmp_path, capfd):
    with opened(tmp_path, RUN, 3) as store:
        for step in (10, 20):
            save(store, saved(step))
    shutil.rmtree(tmp_path / "20")
    (tmp_path / "20").mkdir()
    (tmp_path / "30").touch()  # a file is no checkpoint, and never was one
    line = f"fit: checkpoint {tmp_path}/20 cannot be read: the folder holds nothing of a checkpoint\n"
    with opened(tmp_path, RUN, 3) as store:
        assert latest(store, saved().state).step == 10
        assert capfd.readouterr().err == line
    params = saved().state.params
    checkpoint.load_params(tmp_path, params, "last")
    assert capfd.readouterr().err == line


def test_if_all_are_damaged_they_are_named_and_nothing_starts_anew(tmp_path, capfd):
    with opened(tmp_path, RUN, 3) as store:
        for step in (10, 20):
            save(store, saved(step))
    for path in tmp_path.rglob("*/_METADATA"):
        damaged(path, "empty")
    before = tree(tmp_path)
    with (
        opened(tmp_path, RUN, 3) as store,
        pytest.raises(OSError, match=f"^fit: no checkpoint in {tmp_path} can be read; tried 20, 10$"),
    ):
        latest(store, saved().state)
    assert len(capfd.readouterr().err.splitlines()) == 2
    assert set(tree(tmp_path)) == set(before)


def test_what_a_killed_process_left_unfinished_is_removed(tmp_path):
    with opened(tmp_path, RUN, 3) as store:
        save(store, saved(10))
    shutil.copytree(tmp_path / "10", tmp_path / "15.unfinished")
    with opened(tmp_path, RUN, 3) as store:
        assert latest(store, saved().state).step == 10
        save(store, saved(20))
    assert names(tmp_path) == {"10", "20"}


def nll(params, x, key):
    return jnp.square(x @ params["w"])


def fitted(folder, *, width=4, data=None, **options):
    data = np.ones((8, width), np.float32) if data is None else data
    usual = {"num_steps": 4, "batch_size": 4, "progress": "none", "config": {"net": {"width": 4}, "rate": 0.1}}
    options = {"key": KEY, "optimizer": optax.sgd(0.1)} | usual | options
    return fit(nll, params={"w": jnp.ones(width)}, data=data, checkpoint_dir=folder, **options)


CHANGES = [
    ({"config": {"net": {"width": 5}, "rate": 0.1}}, "config.net.width = 4, this run has 5"),
    ({"config": {"net": {"width": 4}}}, "config.rate = 0.1, this run has nothing"),
    ({"config": {"net": {"width": 4}, "rate": 0.1, "new": [1]}}, "config.new = nothing, this run has [1]"),
    ({"batch_size": 2}, "batch_size = 4, this run has 2"),
    ({"log_every": 2}, "log_every = 1, this run has 2"),
    ({"ema_decay": 0.9}, "ema_decay = null, this run has 0.9"),
    ({"data": np.ones((9, 4), np.float32)}, 'data = "float32[8, 4], fingerprint *", this run has "float32[9, 4], *"'),
    ({"data": np.zeros((8, 4))}, 'data = "float32[8, 4], fingerprint *", this run has "float32[8, 4], *"'),
    ({"data": lambda step: np.ones((2, 4))}, 'data = "float32[8, 4], fingerprint *", this run has "batches"'),
    ({"weights": jnp.ones(8)}, 'weights = nothing, this run has "float32[8], fingerprint *"'),
    ({"key": jax.random.key(4)}, 'key = "threefry2x32 [0, 3]", this run has "threefry2x32 [0, 4]"'),
    ({"optimizer": lenient(optax.adam(0.1))}, "optimizer_state[0].count = nothing, this run has \"int32[]\""),
]  # fmt: skip


def test_a_checkpoint_of_another_run_is_refused_with_the_first_difference(tmp_path, monkeypatch):
    fitted(tmp_path)
    before = tree(tmp_path)

    def assert_refused(difference, **change):
        message = re.escape(f"fit: checkpoint {tmp_path}/4 was made with {difference}").replace(r"\*", "[^,]*")
        with pytest.raises(ValueError, match=f"^{message}$"):
            fitted(tmp_path, **change)
        assert tree(tmp_path) == before

    for change, difference in CHANGES:
        assert_refused(difference, **change)
    other = {"data": lambda step: np.ones((2, 5))}
    fitted(tmp_path / "batches", data=lambda step: np.ones((2, 4)))
    with pytest.raises(ValueError, match=re.escape('params[\'w\'] = "float32[4]", this run has "float32[5]"')):
        fitted(tmp_path / "batches", width=5, **other)
    shutil.rmtree(tmp_path / "batches")


def test_other_versions_and_hyperparameters_are_told_and_training_goes_on(tmp_path, monkeypatch, capfd):
    fitted(tmp_path)
    fitted(tmp_path, num_steps=6, optimizer=optax.sgd(0.2))
    told = f"fit: checkpoint {tmp_path}/4 was made by another update of the optimizer; training goes on\n"
    assert told in capfd.readouterr().err
    monkeypatch.setattr(host.importlib.metadata, "version", lambda name: "9.9")
    fitted(tmp_path, num_steps=8, optimizer=optax.sgd(0.2))
    errors = capfd.readouterr().err
    for name in ("jax", "optax"):
        assert re.search(rf"fit: checkpoint {tmp_path}/6 was made with {name} \S+, this run has 9.9; training", errors)


def test_injected_hyperparameters_come_from_the_call(tmp_path):
    def trained(rate, num_steps):
        optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
        return fitted(tmp_path, num_steps=num_steps, optimizer=optimizer).state

    before = trained(0.1, 4)
    after = trained(0.0, 6)
    assert_same_bits(after.params, before.params)
    assert after.optimizer_state.hyperparams["learning_rate"] == 0


def test_params_are_loaded_without_optimizer_data_or_nll(tmp_path):
    options = {"validation": np.ones((3, 4), np.float32), "validate_every": 2, "num_steps": 6}
    state = fitted(tmp_path, **options).state
    like = {"w": jnp.zeros(4)}
    assert_same_bits(mle.load_params(tmp_path, like, "last"), state.params)
    assert_same_bits(mle.load_params(tmp_path, like), state.best.params)
    fitted(tmp_path / "other", optimizer=lenient(optax.adam(0.1)))
    for folder, other, which, message in [
        (
            tmp_path / "other",
            like,
            "best",
            'has no best params; nothing was validated, or all scores were NaN; ask for "last"',
        ),
        (tmp_path, {"w": jnp.zeros(5)}, "last", "params['w'] of {}/6 is float32[4], like has float32[5]"),
        (tmp_path, {"v": jnp.zeros(4)}, "last", "params['v'] of {}/6 is nothing, like has float32[4]"),
        (tmp_path, {}, "last", "{}/6 has 1 arrays of these, like has 0"),
        (tmp_path, like, "first", 'load_params: which must be "best" or "last", got \'first\''),
    ]:
        with pytest.raises(ValueError, match=re.escape(message.format(tmp_path))):
            mle.load_params(folder, other, which)
    with pytest.raises(OSError, match=f"load_params: no checkpoint in {tmp_path}/none can be read"):
        mle.load_params(tmp_path / "none", like)


def test_a_config_that_no_file_holds_is_refused(tmp_path):
    message = re.escape("fit: config must be made of values of JSON: Object of type ArrayImpl is not")
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path, config={"rate": jnp.ones(3)})


@pytest.mark.parametrize("place", ["file/run", "/proc/run", "file"])
def test_a_folder_that_cannot_be_written_is_told_before_training(place, tmp_path):
    """`nll` would fail with another error: there are no params["w"]."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"^fit: checkpoint_dir {tmp_path / place} cannot be written: .+$"):
        fit(nll, optax.sgd(0.1), 0.0, jnp.ones(3), KEY, num_steps=1, batch_size=1, checkpoint_dir=tmp_path / place)


def test_a_folder_where_another_process_trains_is_refused(tmp_path):
    with (
        opened(tmp_path, RUN, 3),
        pytest.raises(OSError, match=f"^fit: another process is training in {tmp_path}$"),
        opened(tmp_path, RUN, 3),
    ):
        pass


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    """A folder of any other name is neither read nor counted nor deleted."""
    for name in ("2026", "007", "²"):
        (tmp_path / name).mkdir()
    (tmp_path / "2026" / "notes.txt").write_text("mine")
    (tmp_path / "5").write_text("a file")
    with opened(tmp_path, RUN, 1) as store:
        assert latest(store, saved().state) is None
        for step in (1, 2):
            save(store, saved(step))
        with pytest.raises(OSError, match=r"checkpoint .*/2026 cannot be written: Directory not empty; the last good"):
            save(store, saved(2026))
    assert names(tmp_path) == {"2", "2026", "007", "²", "5"}
    assert (tmp_path / "2026" / "notes.txt").read_text() == "mine"


def test_an_old_checkpoint_that_cannot_be_deleted_ends_nothing(tmp_path, monkeypatch):
    def rename(path, to, rename=Path.rename):
        if "removed" in to.name and path.name == "1":
            raise OSError(16, os.strerror(16))
        rename(path, to)

    monkeypatch.setattr(Path, "rename", rename)
    with opened(tmp_path, RUN, 1) as store:
        for step in (1, 2, 3):
            save(store, saved(step))
    assert {path.name for path in tmp_path.glob("[0-9]*")} == {"1", "3"}


def test_a_checkpoint_is_on_the_disk_before_an_older_one_goes(tmp_path, monkeypatch):
    log = []
    sync, remove = checkpoint.os.fsync, checkpoint._remove
    monkeypatch.setattr(checkpoint.os, "fsync", lambda fd: (log.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    monkeypatch.setattr(checkpoint, "_remove", lambda folder: (log.append("removed"), remove(folder)))
    with opened(tmp_path, RUN, 1) as store:
        for step in (1, 2):
            save(store, saved(step))
    unfinished = f"{tmp_path}/2.unfinished"
    parts = [f"{unfinished}/description.json", f"{unfinished}/seal.json", unfinished, str(tmp_path), "removed"]
    assert log[-5:] == parts


@pytest.mark.parametrize("place", ["gs://bucket/run", "~/run"])
def test_a_place_elsewhere_is_refused_and_home_is_home(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if "://" in place:
        message = "fit: checkpoint_dir must be a folder that this machine has mounted, got gs://bucket/run"
        with pytest.raises(ValueError, match=message), opened(place, RUN, 1):
            pass
        assert not list(tmp_path.iterdir())
    else:
        with opened(place, RUN, 1) as store:
            assert store.directory == tmp_path / "home" / "run"


def test_where_nothing_can_be_locked_that_is_told(tmp_path, monkeypatch, capfd):
    import fcntl

    def flock(handle, how):
        raise OSError(37, os.strerror(37))

    monkeypatch.setattr(fcntl, "flock", flock)
    with opened(tmp_path, RUN, 1):
        pass
    reason = f"cannot be locked, {os.strerror(37)}: see to it that no other process trains there"
    assert capfd.readouterr().err == f"fit: {tmp_path} {reason}\n"


@pytest.mark.parametrize("limit", [0, 200, 20_000])
def test_a_disk_that_takes_no_more_is_one_line_and_the_last_good_checkpoint_stays(limit, tmp_path, capfd, caplog):
    """A limit on the size of a file fails every writer as a full disk does, anywhere in the checkpoint."""
    params = {"w": jax.random.normal(KEY, (100, 100))}
    with opened(tmp_path, RUN, 3) as store:
        save(store, saved(10, params=params))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(OSError, match="cannot be written") as caught:
                save(store, saved(20, params=params))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    reason = re.escape(os.strerror(27))
    good = f"the last good one is {tmp_path}/10"
    assert re.fullmatch(f"fit: checkpoint {tmp_path}/20 cannot be written: .*{reason}.*; {good}", str(caught.value))
    assert capfd.readouterr().err == ""
    assert not caplog.records
    assert names(tmp_path) == {"10"}
    with opened(tmp_path, RUN, 3) as store:
        assert_same_bits(latest(store, saved(10, params=params).state).state, saved(10, params=params).state)


def test_the_system_s_words_are_found_in_what_orbax_says():
    error = ValueError("RESOURCE_EXHAUSTED: Error writing\nFailed to write: [os_error_code='28']")
    assert checkpoint._reason(error) == "No space left on device"


def test_without_orbax_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    message = re.escape('fit: checkpoint_dir needs orbax: pip install "jprob[checkpoint]"')
    with pytest.raises(ImportError, match=message):
        fitted(tmp_path)


def test_orbax_and_rich_are_loaded_only_where_they_are_needed():
    code = "import sys, jprob.mle.fit; print({'orbax', 'rich', 'tensorstore'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout == "set()\n"
