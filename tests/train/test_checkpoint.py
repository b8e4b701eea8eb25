"""A checkpoint comes back bit for bit, or not at all."""

import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from train.checkpoint import Checkpoints
from train.guard import new_guard
from train.mesh import make_mesh
from train.optim import optimizer
from train.sections import MeshConfig, OptimConfig
from train.state import TrainState, new_state

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


def saved(out, mesh, steps, keep=2) -> None:
    with Checkpoints(out, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(state_on(mesh, step), data={"row": 8 * step}, identity=IDENTITY)


def test_round_trip_on_another_mesh(tmp_path, mesh):
    saved(tmp_path, mesh, [3])
    like = structs(state_on(make_mesh(MeshConfig(data=2, fsdp=4))))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest == 3
        checkpoints.check(IDENTITY)
        assert checkpoints.position() == {"row": 24}
        restored = checkpoints.restore(like)
    jax.tree.map(np.testing.assert_array_equal, restored, state_on(mesh, 3))
    assert restored.params["w"].sharding == like.params["w"].sharding


def test_keeps_the_last(tmp_path, mesh):
    saved(tmp_path, mesh, [1, 2, 3, 4], keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_another_runs_checkpoint_is_refused_by_field(tmp_path, mesh):
    saved(tmp_path, mesh, [3])
    with pytest.raises(ValueError) as error:
        Checkpoints(tmp_path, keep=2).check(IDENTITY | {"model.hidden_size": 32, "seed": 1})
    message = str(error.value)
    assert "model.hidden_size is 64 there, 32 here, seed is 0 there, 1 here" in message
    assert "tokenizer" not in message and "another --out" in message


def test_looking_creates_nothing(tmp_path):
    assert Checkpoints(tmp_path / "new", keep=2).latest is None
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_checkpoint_is_not_there(tmp_path, mesh):
    """What a kill while saving leaves behind is ignored, and cleared by the next run."""
    saved(tmp_path, mesh, [3])
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    assert Checkpoints(tmp_path, keep=2).latest == 3


def test_a_full_disk_is_one_line_and_the_last_good_one_stays(tmp_path, mesh):
    """The file-size limit stands in for the disk: writes fail with an OS error half way."""
    saved(tmp_path, mesh, [3], keep=1)
    checkpoints = Checkpoints(tmp_path, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError) as error:
            big = state_on(mesh, 4, size=80_000)
            checkpoints.save(big, data={"row": 32}, identity=IDENTITY)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(error.value)
    assert "cannot write the checkpoint of step 4" in message and "step 3 is intact" in message
    assert "\n" not in message
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]
    with Checkpoints(tmp_path, keep=1) as again:
        restored = again.restore(structs(state_on(mesh)))
    jax.tree.map(np.testing.assert_array_equal, restored, state_on(mesh, 3))


def test_too_little_room_is_found_before_writing(tmp_path, mesh, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    checkpoints = Checkpoints(tmp_path / "new", keep=2)
    with pytest.raises(OSError, match="a checkpoint needs 6,168 bytes, .* has 5"):
        checkpoints.check_space(structs(state_on(mesh)))
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_checkpoint_is_one_line(tmp_path, mesh):
    saved(tmp_path, mesh, [3])
    run = tmp_path / "checkpoints" / "3" / "run" / "metadata"
    assert json.loads(run.read_text())["data"] == {"row": 24}
    run.write_text("{")
    with pytest.raises(ValueError, match="cannot read the checkpoint .*/3: ") as error:
        Checkpoints(tmp_path, keep=2).check(IDENTITY)
    assert "\n" not in str(error.value)
