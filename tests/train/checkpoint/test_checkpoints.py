"""A checkpoint comes back bit for bit, or not at all."""

import resource
import shutil

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

IDENTITY = {"model.hidden_size": 64, "tokenizer": "byte", "seed": 0}


def state_on(mesh, step=0, size=64) -> TrainState:
    """A state of random numbers, split over fsdp."""
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


def test_a_half_written_checkpoint_is_not_there(tmp_path, mesh):
    """What a kill while saving leaves behind is ignored, and removed by who trains on."""
    saved(tmp_path, mesh, [3])
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    assert checkpoints.latest == 3
    checkpoints.remove_half_written()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_a_full_disk_is_one_line_and_the_last_good_one_stays(tmp_path, mesh):
    """The file-size limit stands in for the disk: writes fail with an OS error half way."""
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


def spoil_json(checkpoint):
    (checkpoint / "run" / "metadata").write_text("{")


def data_file(checkpoint):
    files = [p for p in (checkpoint / "state").rglob("d/*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def cut_data(checkpoint):
    """As a disk that lied about its writes leaves it."""
    file = data_file(checkpoint)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(checkpoint):
    """Which orbax does not notice."""
    data = bytearray(data_file(checkpoint).read_bytes())
    data[len(data) // 2] ^= 0x10
    data_file(checkpoint).write_bytes(data)


def lose_directory(checkpoint):
    shutil.rmtree(checkpoint / "state")


@pytest.mark.parametrize("damage", [spoil_json, cut_data, flip_a_bit, lose_directory])
def test_a_corrupt_latest_checkpoint_is_put_aside_and_said(tmp_path, mesh, damage, capfd):
    """The one before it is used, and the next one of that step can be written."""
    saved(tmp_path, mesh, [3, 6], size=4096)
    capfd.readouterr()
    damage(tmp_path / "checkpoints" / "6")
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        checkpoints.check(IDENTITY)
        restored, position = checkpoints.restore(structs(state_on(mesh, size=4096)))
        assert (checkpoints.latest, position) == (3, {"row": 24})
        jax.tree.map(np.testing.assert_array_equal, restored, state_on(mesh, 3, 4096))
        said = capfd.readouterr().out
        assert said.count("\n") == 1 and said.startswith("cannot read the checkpoint ")
        assert said.endswith(f"it is now {tmp_path / 'unreadable-6'}, using step 3\n")
        assert list((tmp_path / "unreadable-6").iterdir())
        checkpoints.save(state_on(mesh, 6, 4096), data={"row": 48}, identity=IDENTITY)
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        assert checkpoints.latest == 6
        assert checkpoints.restore(structs(state_on(mesh, size=4096)))[1] == {"row": 48}


def test_when_none_can_be_read_nothing_begins_anew(tmp_path, mesh, capfd):
    saved(tmp_path, mesh, [3])
    spoil_json(tmp_path / "checkpoints" / "3")
    with pytest.raises(ValueError, match="no checkpoint of .* can be read: choose another --out"):
        Checkpoints(tmp_path, keep_last=2).check(IDENTITY)
    assert (tmp_path / "unreadable-3").exists()


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


def test_other_code_is_said(tmp_path, mesh, capfd, monkeypatch):
    saved(tmp_path, mesh, [3])
    Checkpoints(tmp_path, keep_last=1).check(IDENTITY)
    assert "other code" not in capfd.readouterr().out
    monkeypatch.setattr("train.checkpoint.checkpoints.code_version", lambda: {"commit": "abc"})
    Checkpoints(tmp_path, keep_last=1).check(IDENTITY)
    assert "step 3 was written by other code: commit " in capfd.readouterr().out
