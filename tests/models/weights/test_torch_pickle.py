"""pytorch_model.bin: tensors come out exactly, and nothing a file says is run.

The files are written here, by hand, as torch.save writes them; tests/models/test_torch.py reads
those that torch itself wrote.
"""

import collections
import io
import json
import os
import pickle
import shutil
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from models.execution import Execution
from models.weights.load import load_hf
from models.weights.table import hf_tensors
from models.weights.torch_pickle import BinFile

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(np.int64): "LongStorage",
}


class Named:
    """Pickles as a reference to module.name, whether or not there is such a thing."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickles as the call of a name."""

    def __init__(self, module, name, *args):
        self.parts = Named(module, name), args

    def __reduce__(self):
        return self.parts


class Stored:
    """Pickles as a persistent id."""

    def __init__(self, storage, key, numel):
        self.pid = ("storage", Named("torch", storage), key, "cpu", numel)


class Pickler(pickle._Pickler):
    """Writes `Named` and `Stored` the way torch does."""

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Stored) else None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Named):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        else:
            super().save(obj, save_persistent_id)


class Forger(Pickler):
    """Sets the dtype of every storage, which a pickle may do to what it has made (BUILD)."""

    dtype = "O"

    def save_pers(self, pid):
        super().save_pers(pid)
        self.write(pickle.EMPTY_DICT)
        self.save("dtype")
        self.save(self.dtype)
        self.write(pickle.SETITEM + pickle.BUILD)


# save_reduce of a Call must find its function callable.
Named.__call__ = lambda self: None


def rebuilt(x, key, *, offset=0, stride=None):
    """Pickle the description of a tensor in a storage."""
    stride = stride or tuple(s // x.itemsize for s in x.strides)
    storage = Stored(STORAGES[x.dtype], key, x.size)
    args = (storage, offset, x.shape, stride, False, collections.OrderedDict())
    return Call("torch._utils", "_rebuild_tensor_v2", *args)


def write(path, state, storages=None, pickler=Pickler):
    """Write a zip as torch.save does; storages are bytes by key."""
    out = io.BytesIO()
    pickler(out, protocol=2).dump(state)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", out.getvalue())
        file.writestr("archive/byteorder", "little")
        for key, data in (storages or {}).items():
            file.writestr(f"archive/data/{key}", data)
    return path


def write_tensors(path, tensors):
    state = collections.OrderedDict((n, rebuilt(x, str(i))) for i, (n, x) in enumerate(tensors))
    return write(path, state, {str(i): x.tobytes() for i, (_, x) in enumerate(tensors)})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_come_out_exactly(tmp_path, dtype):
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(dtype)
    with BinFile(write_tensors(tmp_path / "a.bin", [("x", x), ("one", x[0])])) as file:
        assert file.shapes == {"x": (3, 5), "one": (5,)}
        assert file.dtypes["x"] == x.dtype.name
        np.testing.assert_array_equal(file.tensor("x"), x)
        np.testing.assert_array_equal(file.tensor("one"), x[0])


def test_views_of_one_storage(tmp_path):
    """A transposed tensor and a slice, as torch.save keeps them."""
    x = np.arange(12, dtype=np.float32)
    state = {
        "transposed": rebuilt(x.reshape(3, 4).T, "0"),
        "slice": rebuilt(x[4:6], "0", offset=4),
        "parameter": Call("torch._utils", "_rebuild_parameter", rebuilt(x, "0"), True, {}),
    }
    with BinFile(write(tmp_path / "a.bin", state, {"0": x.tobytes()})) as file:
        np.testing.assert_array_equal(file.tensor("transposed"), x.reshape(3, 4).T)
        np.testing.assert_array_equal(file.tensor("slice"), x[4:6])
        np.testing.assert_array_equal(file.tensor("parameter"), x)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_checkpoint_of_bin_files_loads(tmp_path, tiny_dir, shards):
    """The golden checkpoint as pytorch_model.bin, and in shards with an index."""
    tensors = load_file(tiny_dir / "model.safetensors")
    shutil.copyfile(tiny_dir / "config.json", tmp_path / "config.json")
    weight_map = {}
    for i in range(shards):
        part = sorted(tensors.items())[i::shards]
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05}-of-00002.bin"
        write_tensors(tmp_path / name, part)
        weight_map |= {n: name for n, _ in part}
    if shards > 1:
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model = load_hf(tmp_path, execution=Execution(dtype="float32"))
    want = load_hf(tiny_dir, execution=Execution(dtype="float32"))
    for _, weight, _ in hf_tensors(model.config):
        leaves = []
        for leaf in (model, want):
            for part in weight.path.split("."):
                leaf = getattr(leaf, part)
            leaves.append(np.asarray(leaf.get_value()))
        np.testing.assert_array_equal(*leaves)


@pytest.mark.parametrize(
    "call",
    [
        Call("os", "system", "touch ran"),
        Call("posix", "system", "touch ran"),
        Call("builtins", "eval", "open('ran', 'w')"),
        Call("torch._utils", "_rebuild_tensor", "touch ran"),
        Call("torch.serialization", "load", "other.bin"),
        Call("collections", "namedtuple", "a", "b"),
    ],
    ids=lambda c: f"{c.parts[0].module}.{c.parts[0].name}",
)
def test_code_is_refused_not_run(tmp_path, monkeypatch, call):
    """Even beside good tensors; the names in the file's pickle are never looked up."""
    monkeypatch.chdir(tmp_path)
    x = np.ones(2, np.float32)
    path = write(tmp_path / "a.bin", {"x": rebuilt(x, "0"), "y": call}, {"0": x.tobytes()})
    where = f"{call.parts[0].module}.{call.parts[0].name}"
    with pytest.raises(ValueError, match=f"contains more than tensors: it names {where}, which"):
        BinFile(path)
    assert not os.path.exists("ran")


@pytest.mark.parametrize("dtype", ["O", "complex64", "int32", "xx", 7])
def test_a_forged_type_is_refused(tmp_path, dtype):
    """As objects, numpy would take the file's bytes for pointers."""
    forger = type("", (Forger,), {"dtype": dtype})
    x = np.ones(4, np.float32)
    path = write(tmp_path / "a.bin", {"x": rebuilt(x, "0")}, {"0": x.tobytes()}, forger)
    with pytest.raises(ValueError, match="contains values that are not tensors of float32, .*: x$"):
        BinFile(path)


X = np.arange(4, dtype=np.float32)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"x": rebuilt(X, "0", offset=1)}, "x needs 16 bytes, its storage has 12"),
        ({"x": rebuilt(X, "0", stride=(1 << 20,))}, "its storage has 16"),
        ({"x": rebuilt(X, "7")}, "the bytes of x are broken"),
        ({"x": rebuilt(X, "0", stride=(-1,))}, "contains values that are not tensors of .*: x"),
        ({"x": rebuilt(X, "0", offset=-1)}, "contains values that are not tensors of .*: x"),
        ({"x": rebuilt(X, "0", stride=(1, 1))}, "contains values that are not tensors of .*: x"),
        ({"x": rebuilt(X, "0"), "step": 3}, "contains values that are not tensors of .*: step"),
        ({"x": rebuilt(X.astype(np.int64), "0")}, "names torch.LongStorage, which is not run"),
        ([rebuilt(X, "0")], "contains a list, must contain a dictionary"),
    ],
)
def test_broken_descriptions(tmp_path, state, message):
    path = write(tmp_path / "a.bin", state, {"0": X.tobytes()})
    with pytest.raises(ValueError, match=message) as error, BinFile(path) as file:
        file.tensor("x")
    assert "\n" not in str(error.value)


def test_broken_files(tmp_path):
    path = write_tensors(tmp_path / "a.bin", [("x", X)])
    data = path.read_bytes()
    path.write_bytes(data[:-30])
    with pytest.raises(ValueError, match=r"a\.bin is not a complete zip of torch\.save"):
        BinFile(path)
    flipped = bytearray(data)
    flipped[data.index(X.tobytes()) + 3] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="bytes of x are broken: Bad CRC"), BinFile(path) as file:
        file.tensor("x")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme", "no weights")
    with pytest.raises(ValueError, match=r"no data\.pkl in it"):
        BinFile(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}")
    with pytest.raises(ValueError, match="is damaged"):
        BinFile(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}, 2))
        file.writestr("archive/byteorder", "big")
    with pytest.raises(ValueError, match="big-endian"):
        BinFile(path)


def damaged(path, name, change):
    """Change the local header or the data of a member in a zip."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        info = file.getinfo(name)
    begin = info.header_offset + 30 + len(info.filename.encode())
    change(data, info.header_offset, begin, info)
    path.write_bytes(data)
    return path


def flip(data, _, begin, __):
    data[begin + 1] ^= 4


def encrypt(data, header, _, info):
    data[header + 6] |= 1
    central = data.rindex(b"PK\x01\x02", 0, data.rindex(info.filename.encode()))
    data[central + 8] |= 1


@pytest.mark.parametrize("member", ["data.pkl", "byteorder", "data/0"])
@pytest.mark.parametrize("change", [flip, encrypt])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_or_encrypted_member_is_one_line(tmp_path, member, change, compression):
    """Bad CRC, broken deflate, and a password, in every member that is read."""
    out = io.BytesIO()
    Pickler(out, protocol=2).dump({"x": rebuilt(X, "0")})
    with zipfile.ZipFile(tmp_path / "a.bin", "w", compression) as file:
        file.writestr("archive/data/0", X.tobytes())
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/data.pkl", out.getvalue())
    path = damaged(tmp_path / "a.bin", f"archive/{member}", change)
    with pytest.raises(ValueError, match=r"a\.bin") as error, BinFile(path) as file:
        file.tensor("x")
    assert "\n" not in str(error.value)
