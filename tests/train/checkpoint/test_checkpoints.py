"""A checkpoint comes back bit for bit, or not at all."""

import errno
import os
import resource
import shutil
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from train.checkpoint.checkpoints import Checkpoints
from train.config.sections import MeshConfig, OptimConfig
from train.distributed.mesh import make_mesh
from train.step.guard import new_guard
from train.step.optim import optimizer
from train.step.state import TrainState, new_state

POOL = "metadata_store"  # an executor of orbax: its idle thread ends with the process
IDENTITY = {"model.hidden_size": 64, "tokenizer": "byte", "seed": 0}


def state_on(mesh, step=0, size=64) -> TrainState:
    """Make a state of random numbers, split over fsdp."""
    where = NamedSharding(mesh, P("fsdp"))
    w = jax.device_put(jax.random.normal(jax.random.key(step), (size, 8)), where)
    tx = optimizer(OptimConfig(), 1e-3, 10)
    begin = TrainState(
        step=jnp.int32(step), params={"w": w}, opt_state=tx.init({"w": w}), guard=new_guard()
    )
    everywhere = NamedSharding(mesh, P())
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where if a.ndim else everywhere),
        begin,
    )
    state = new_state({"w": w}, tx, like)
    return TrainState(
        step=jax.device_put(jnp.int32(step), everywhere),
        params=state.params,
        opt_state=state.opt_state,
        guard=state.guard,
    )


def structs(state):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig())


def saved(out, mesh, steps, keep=2, size=64) -> None:
    with Checkpoints(out, keep_last=keep) as checkpoints:
        for step in steps:
            checkpoints.save(state_on(mesh, step, size), data={"row": 8 * step}, identity=IDENTITY)


def test_round_trip_on_another_mesh(tmp_path, mesh):
    saved(tmp_path, mesh, [3])
    like = structs(state_on(make_mesh(MeshConfig(data=2, fsdp=4))))
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        assert checkpoints.latest == 3
        checkpoints.check(IDENTITY)
        restored, position = checkpoints.restore(like)
        assert position == {"row": 24}
    jax.tree.map(np.testing.assert_array_equal, restored, state_on(mesh, 3))
    assert restored.params["w"].sharding == like.params["w"].sharding


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, mesh, wrong):
    """One such weight is enough; the checkpoint before stays the latest."""
    saved(tmp_path, mesh, [3], keep=1)
    state = state_on(mesh, 4)
    w = np.array(state.params["w"])
    w[5, 1] = wrong
    bad = state._replace(params={"w": jax.device_put(w, state.params["w"].sharding)})
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        with pytest.raises(FloatingPointError, match="not finite after step 4.*checkpoint: 3"):
            checkpoints.save(bad, data={}, identity=IDENTITY)
        assert checkpoints.latest == 3
        checkpoints.save(state, data={}, identity=IDENTITY)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_keeps_the_last(tmp_path, mesh):
    saved(tmp_path, mesh, [1, 2, 3, 4], keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_another_runs_checkpoint_is_refused_by_field(tmp_path, mesh):
    saved(tmp_path, mesh, [3])
    with pytest.raises(ValueError) as error:
        Checkpoints(tmp_path, keep_last=2).check(IDENTITY | {"model.hidden_size": 32, "seed": 1})
    message = str(error.value)
    assert "model.hidden_size is 64 there, 32 here, seed is 0 there, 1 here" in message
    assert "tokenizer" not in message and "another --out" in message


def test_looking_creates_nothing(tmp_path):
    assert Checkpoints(tmp_path / "new", keep_last=2).latest is None
    assert list(tmp_path.iterdir()) == []


def test_a_partial_checkpoint_does_not_count(tmp_path, mesh):
    """The directory that a kill during a save leaves is ignored, and removed on request."""
    saved(tmp_path, mesh, [3])
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    assert checkpoints.latest == 3
    checkpoints.remove_partial()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_a_full_disk_is_one_line_and_the_last_good_one_stays(tmp_path, mesh):
    """A file-size limit simulates the full disk: a write fails in the middle."""
    saved(tmp_path, mesh, [3], keep=1)
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:  # without writing what is compiled meanwhile
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
        with pytest.raises(OSError) as error:
            big = state_on(mesh, 4, size=80_000)
            checkpoints.save(big, data={"row": 32}, identity=IDENTITY)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    message = str(error.value)
    assert "cannot write the checkpoint of step 4" in message and "step 3 is intact" in message
    assert "\n" not in message
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]
    with Checkpoints(tmp_path, keep_last=1) as again:
        restored, _ = again.restore(structs(state_on(mesh)))
    jax.tree.map(np.testing.assert_array_equal, restored, state_on(mesh, 3))


def test_too_little_room_is_found_before_writing(tmp_path, mesh, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    checkpoints = Checkpoints(tmp_path / "new", keep_last=2)
    with pytest.raises(OSError, match="a checkpoint needs 6,168 bytes, .* has 5"):
        checkpoints.check_space(structs(state_on(mesh)))
    assert list(tmp_path.iterdir()) == []


def metadata(checkpoint):
    return checkpoint / "run" / "metadata"


def edit_metadata(old: bytes, new: bytes):
    """Make a damage that replaces a part of the metadata."""

    def edit(checkpoint):
        content = metadata(checkpoint).read_bytes()
        assert old in content
        metadata(checkpoint).write_bytes(content.replace(old, new))

    return edit


def replace_metadata(content: bytes):
    return lambda checkpoint: metadata(checkpoint).write_bytes(content)


def lose_metadata(checkpoint):
    metadata(checkpoint).unlink()


def data_file(checkpoint):
    files = [p for p in (checkpoint / "state").rglob("d/*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def cut_data(checkpoint):
    """Cut a file in half, as a disk that lied about its writes leaves it."""
    file = data_file(checkpoint)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(checkpoint):
    """Flip a bit in each of 16 places: a single one may be in a part that nothing refers to."""
    data = bytearray(data_file(checkpoint).read_bytes())
    for place in range(len(data) // 32, len(data), len(data) // 16):
        data[place] ^= 0x10
    data_file(checkpoint).write_bytes(data)


def lose_directory(checkpoint):
    shutil.rmtree(checkpoint / "state")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(cut_data, id="array-cut"),
        pytest.param(flip_a_bit, id="array-bit"),
        pytest.param(lose_directory, id="arrays-lost"),
        pytest.param(lose_metadata, id="metadata-lost"),
    ],
)
def test_a_damaged_checkpoint_is_quarantined(tmp_path, mesh, damage, caplog):
    """The checkpoint before it is restored, with one log line, and that step can be saved again."""
    saved(tmp_path, mesh, [3, 6], size=4096)
    damage(tmp_path / "checkpoints" / "6")
    caplog.clear()
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        checkpoints.check(IDENTITY)
        restored, position = checkpoints.restore(structs(state_on(mesh, size=4096)))
        assert (checkpoints.latest, position) == (3, {"row": 24})
        jax.tree.map(np.testing.assert_array_equal, restored, state_on(mesh, 3, 4096))
        [message] = [r.getMessage() for r in caplog.records if r.name.startswith("train")]
        assert message.startswith(f"the checkpoint {tmp_path / 'checkpoints' / '6'} is damaged (")
        assert message.endswith(f"moved to {tmp_path / 'corrupt-6'}, using step 3")
        assert "\n" not in message
        assert checkpoints.quarantined == [tmp_path / "corrupt-6"]
        assert list((tmp_path / "corrupt-6").iterdir())
        checkpoints.save(state_on(mesh, 6, 4096), data={"row": 48}, identity=IDENTITY)
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        assert checkpoints.latest == 6
        assert checkpoints.restore(structs(state_on(mesh, size=4096)))[1] == {"row": 48}


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(edit_metadata(b'"row": 48', b'"row": 58'), id="another-position"),
        pytest.param(edit_metadata(b'"identity"', b'"identitx"'), id="another-key"),
        pytest.param(edit_metadata(b'"sha256"', b'"sha257"'), id="another-digest-key"),
        pytest.param(edit_metadata(b'"seed": 0', b'"seed": 1'), id="another-run"),
        pytest.param(replace_metadata(b""), id="metadata-empty"),
        pytest.param(replace_metadata(b"[" * 100_000), id="metadata-nested"),
    ],
)
def test_damaged_metadata_are_found_before_arrays_are_read(tmp_path, mesh, damage):
    """Neither another position nor another run's identity is believed."""
    saved(tmp_path, mesh, [3, 6])
    damage(tmp_path / "checkpoints" / "6")
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.check(IDENTITY)
    assert checkpoints.latest == 3
    assert checkpoints.quarantined == [tmp_path / "corrupt-6"]


def test_when_none_can_be_read_nothing_begins_anew(tmp_path, mesh):
    saved(tmp_path, mesh, [3])
    lose_metadata(tmp_path / "checkpoints" / "3")
    with pytest.raises(ValueError, match="no checkpoint of .* can be read: choose another --out"):
        Checkpoints(tmp_path, keep_last=2).check(IDENTITY)
    assert (tmp_path / "corrupt-3").exists()
    assert Checkpoints(tmp_path, keep_last=2).quarantined == [tmp_path / "corrupt-3"]


@pytest.fixture
def as_user():
    """Permissions hold for this process, also where the tests run as root; yields a directory."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        if os.getresuid()[2] == 0:
            os.setresuid(0, 0, 0)


def take_permission(path, mode):
    """Set the mode, and give up root's right to ignore it."""
    path.chmod(mode)
    if os.getuid() == 0:
        for each in (path, *path.parents):
            if each.is_relative_to(tempfile.gettempdir()) and each != Path(tempfile.gettempdir()):
                os.chown(each, 65534, 65534)
        os.setresuid(65534, 65534, 0)


@pytest.mark.parametrize("what", ["run/metadata", "state", "."])
def test_a_checkpoint_without_permission_is_not_moved(as_user, mesh, what):
    """It may be intact: the error names it, and it stays where it is."""
    saved(as_user, mesh, [3, 6])
    like = structs(state_on(mesh))
    for path in (as_user, *as_user.rglob("*")):
        path.chmod(0o777)
    take_permission(as_user / "checkpoints" / "6" / what, 0)
    with Checkpoints(as_user, keep_last=2) as checkpoints:
        with pytest.raises(OSError) as error:
            checkpoints.check(IDENTITY)
            checkpoints.restore(like)
    message = str(error.value)
    assert "cannot read the checkpoint" in message and "no permission to read" in message
    assert "stays where it is" in message and "\n" not in message
    assert sorted(p.name for p in (as_user / "checkpoints").iterdir()) == ["3", "6"]
    assert not list(as_user.glob("corrupt-*"))


def read_only(checkpoints, monkeypatch):
    for path in (checkpoints.parent, *checkpoints.parent.rglob("*")):
        path.chmod(0o777)
    take_permission(checkpoints, 0o555)


def no_inodes(checkpoints, monkeypatch):
    """Fail to create directories inside the directory of the step."""
    mkdir = os.mkdir

    def full(path, *args, **kwargs):
        if "/state.orbax" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", full)


def no_threads(checkpoints, monkeypatch):
    """Start the first threads of the save, and fail to start later ones."""
    start, left = threading.Thread.start, [7]

    def fail_later(thread):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail_later)


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        (read_only, "Permission denied"),
        (no_inodes, "No space left on device"),
        (no_threads, "can't start new thread"),
    ],
)
def test_a_save_that_cannot_be_made_ends_within_seconds(
    as_user, mesh, obstacle, reason, monkeypatch, capfd
):
    """One line, the old checkpoint stays, and no thread keeps the process from ending."""
    saved(as_user, mesh, [3])
    new = state_on(mesh, 4)
    before = set(threading.enumerate())
    capfd.readouterr()
    obstacle(as_user / "checkpoints", monkeypatch)
    checkpoints = Checkpoints(as_user, keep_last=1)
    with pytest.raises(OSError) as error:
        checkpoints.save(new, data={"row": 32}, identity=IDENTITY)
        checkpoints.wait()
    monkeypatch.undo()
    message = str(error.value)
    assert reason in message and "step 3 is intact" in message and "\n" not in message
    deadline = time.monotonic() + 10
    for thread in set(threading.enumerate()) - before:
        if not thread.daemon and not thread.name.startswith(POOL):
            thread.join(deadline - time.monotonic())
            assert not thread.is_alive(), thread
    assert capfd.readouterr() == ("", "")
    if os.getresuid()[2] == 0:
        os.setresuid(0, 0, 0)
    with Checkpoints(as_user, keep_last=1) as again:
        restored, _ = again.restore(structs(state_on(mesh)))
    jax.tree.map(np.testing.assert_array_equal, restored, state_on(mesh, 3))


def test_keeps_the_best_beside_the_last(tmp_path, mesh):
    """By validation loss, over a restart too; what was not evaluated is only kept as the last."""
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0}
    for steps in ([1, 2], [3, 4, 5, 6]):
        with Checkpoints(tmp_path, keep_last=1, keep_best=2) as checkpoints:
            for step in steps:
                checkpoints.save(
                    state_on(mesh, step), data={}, identity=IDENTITY, loss=losses.get(step)
                )
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "4", "6"]


def test_other_code_is_logged(tmp_path, mesh, caplog, monkeypatch):
    caplog.set_level("INFO", "train")
    saved(tmp_path, mesh, [3])
    Checkpoints(tmp_path, keep_last=1).check(IDENTITY)
    assert "other code" not in caplog.text
    monkeypatch.setattr("train.checkpoint.checkpoints.code_version", lambda: {"commit": "abc"})
    Checkpoints(tmp_path, keep_last=1).check(IDENTITY)
    assert "step 3 was written by other code: commit " in caplog.text
