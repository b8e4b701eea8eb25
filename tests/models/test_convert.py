"""python -m models.convert: there and back, and what fails leaves nothing behind."""

import json
import os
import resource
import shutil
import signal
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from models import convert
from models.execution import Execution
from models.tokenizer import load_tokenizer
from models.weights.hf_files import HFDirectory
from models.weights.load import hf_parameters, load, load_hf
from models.weights.orbax_checkpoint import load_orbax

SPM = Path(__file__).parents[1] / "data" / "tokenizer_tiny_spm"


@pytest.fixture
def source(tmp_path, tiny_dir):
    shutil.copytree(tiny_dir, tmp_path / "src")
    (tmp_path / "src" / "golden.npz").unlink()
    (tmp_path / "src" / "tokenizer.model").write_bytes(b"tokenizer")
    (tmp_path / "src" / "modeling_internlm2.py").write_text("raise SystemExit('is not run')")
    return tmp_path / "src"


def test_a_converted_model_is_the_same(source, tmp_path, make_mesh, capsys):
    """Exactly, on one device and on a mesh; tokenizer and generation config go along."""
    destination = tmp_path / "new" / "dst"
    assert convert.main([str(source), str(destination)]) == 0
    said = capsys.readouterr()
    assert f"wrote {destination}" in said.out and said.err == ""  # no bar but on a terminal
    want = load_hf(source, execution=Execution(dtype="float32"))
    for mesh in (None, make_mesh(1, 4, 2)):
        got = load(destination, mesh=mesh, execution=Execution(dtype="float32"))
        jax.tree.map(np.testing.assert_array_equal, got, want)
    assert got.output_DV.get_value().sharding.num_devices == 8
    assert {p.name for p in destination.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "modeling_internlm2.py",
        "params",
        "tokenizer.model",
    }
    for same in ("config.json", "modeling_internlm2.py"):
        assert_same_json_or_text(destination / same, source / same)
    assert load_orbax(destination).norm_D.dtype == "bfloat16"


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_there_and_back_is_byte_exact(source, tmp_path, stored):
    """HF -> orbax -> HF: tensors, config and the files beside them, in each stored type."""
    tensors = load_file(source / "model.safetensors")
    tensors = {n: x.astype(jnp.dtype(stored)) for n, x in tensors.items()}
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"torch_dtype": stored}))
    assert convert.main([str(source), str(tmp_path / "orbax")]) == 0
    back = tmp_path / "back"
    assert convert.main([str(tmp_path / "orbax"), str(back), "--max_shard_gb=1e-4"]) == 0
    files = HFDirectory(back)
    assert files.dtypes == dict.fromkeys(tensors, stored)
    for name, x in files.read(tensors):
        assert x.tobytes() == tensors[name].tobytes(), name
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            assert_same_json_or_text(back / path.name, path)
    assert len(list(back.glob("model-0000?-of-0000?.safetensors"))) > 1


def test_a_layout_turns_hf_into_hf(source, tmp_path):
    """And names the files of the source; --dtype rounds."""
    assert (
        convert.main([str(source), str(tmp_path / "dst"), "--layout=internlm2", "--dtype=bfloat16"])
        == 0
    )
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    got, want = load_hf(tmp_path / "dst"), load_hf(source)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_orbax_takes_no_dtype(source, tmp_path, capsys):
    assert convert.main([str(source), str(tmp_path / "dst"), "--dtype=float16"]) == 1
    assert "error: --dtype=float16: orbax keeps the stored dtype" in capsys.readouterr().err


def test_an_existing_destination_is_refused(source, tmp_path, capsys):
    destination = tmp_path / "dst"
    destination.mkdir()
    assert convert.main([str(source), str(destination)]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"error: {destination} exists: choose another name or remove it\n"
    assert not list(destination.iterdir())


@pytest.mark.parametrize(
    "stage",
    ["convert.hf_parameters", "convert.save_orbax", "weights.sidecar_files.copy_sidecar_files"],
)
def test_a_failure_leaves_nothing_behind(source, tmp_path, monkeypatch, capsys, stage):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"models.{stage}", fail)
    before = sorted(tmp_path.iterdir())
    assert convert.main([str(source), str(tmp_path / "dst")]) == 1
    assert capsys.readouterr().err.endswith("error: [Errno 28] No space left on device\n")
    assert sorted(tmp_path.iterdir()) == before


def test_bad_weights_are_one_line(source, tmp_path, capsys):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert convert.main([str(source), str(tmp_path / "dst")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "missing: model.layers.2.attention_norm.weight [64]" in err
    assert not (tmp_path / "dst").exists()


def test_too_little_memory_is_one_line_and_nothing_is_written(
    source, tmp_path, monkeypatch, capsys
):
    """Three times the largest parameter: the embedding, 512 x 64 in float32."""
    free = types.SimpleNamespace(available=3 * 512 * 64 * 4 - 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert convert.main([str(source), str(tmp_path / "dst")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: converting needs 0.0 GB of memory") and err.count("\n") == 1
    assert not (tmp_path / "dst").exists()
    free.available += 1
    assert convert.main([str(source), str(tmp_path / "dst")]) == 0


def test_params_in_one_checkpoint_are_refused(source, tmp_path, capsys):
    """Directories of earlier versions load; a missing parameter is named."""
    orbax = tmp_path / "orbax"
    assert convert.main([str(source), str(orbax)]) == 0
    shutil.rmtree(orbax / "params" / "blocks.ffn.w1_DF")
    assert convert.main([str(orbax), str(tmp_path / "hf")]) == 1
    assert "blocks.ffn.w1_DF is missing" in capsys.readouterr().err
    (orbax / "params" / "_METADATA").touch()
    assert convert.main([str(orbax), str(tmp_path / "hf")]) == 1
    assert "convert the HF weights again" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_a_damaged_orbax_file_is_one_line(source, tmp_path, capsys):
    """It names the parameter; orbax raises a bare Exception, or gives advice about itself."""
    orbax = tmp_path / "orbax"
    assert convert.main([str(source), str(orbax)]) == 0
    for file in (orbax / "params" / "embed_VD").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)
    capsys.readouterr()
    assert convert.main([str(orbax), str(tmp_path / "hf")]) == 1
    err = capsys.readouterr().err
    assert "cannot read " in err and "params/embed_VD, or it is not " in err
    assert err.count("\n") == 1 and not (tmp_path / "hf").exists()


@pytest.mark.parametrize("beside", ["", "nowhere"])
def test_beside_is_a_directory(source, tmp_path, capsys, beside):
    """Of an unset variable nothing is made: Path("") would be the current directory."""
    argv = [str(source), str(tmp_path / "dst"), "--assets_from", beside, "--layout=internlm2"]
    assert convert.main(argv) == 1
    assert f"--assets_from={beside!r} is not a directory" in capsys.readouterr().err


def test_eos_ids_of_a_list_go_along(source, tmp_path):
    """HF takes generation_config.json's: it must not say less than config.json did."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 5]}))
    (source / "generation_config.json").unlink(missing_ok=True)
    convert.convert(source, tmp_path / "hf", layout="internlm2")
    written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert {2, 5} <= set(written["eos_token_id"])


@pytest.mark.parametrize("size", ["0", "-1", "inf", "nan"])
def test_shards_have_a_size(capsys, size):
    assert convert.main(["a", "b", f"--max_shard_gb={size}"]) == 2
    assert "must be above 0 and finite" in capsys.readouterr().err


def test_help_names_both_arguments(capsys):
    with pytest.raises(SystemExit) as stop:
        convert.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "HF directory" in out and "must not exist" in out


def assert_same_json_or_text(got, want):
    if want.suffix == ".json":
        assert json.loads(got.read_text()) == json.loads(want.read_text())
    else:
        assert got.read_bytes() == want.read_bytes()


def test_sigterm_removes_what_was_written(source, tmp_path, monkeypatch):
    """And ends with the status of a process that the signal ended; its handler is as before."""
    before, handler = sorted(tmp_path.iterdir()), signal.getsignal(signal.SIGTERM)
    save = convert.save_orbax

    def save_and_stop(parameters, directory):
        save([next(iter(parameters))], directory)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(convert, "save_orbax", save_and_stop)
    with pytest.raises(SystemExit) as stop:
        convert.main([str(source), str(tmp_path / "dst")])
    assert stop.value.code == 128 + signal.SIGTERM
    assert sorted(tmp_path.iterdir()) == before
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize("flags", [[], ["--layout=internlm2"]])
def test_a_full_disk_is_one_line(source, tmp_path, capfd, flags):
    """A limit of the size of files stands for the disk; orbax logs four tracebacks of its own."""
    before, limits = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        assert convert.main([str(source), str(tmp_path / "dst"), *flags]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lines = capfd.readouterr().err.splitlines()
    (error,) = [line for line in lines if line and "tensor/s" not in line]
    assert error.startswith("error: ") and error.endswith("File too large")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("tokenizer", "assets", "message"),
    [
        ("byte-1", None, "trained on bytes: python -m models.generate {} --tokenizer=byte"),
        ("other", None, "wrote {}, without a tokenizer: --assets_from HF_DIR"),
        ("byte-1", SPM, "is not the run's tokenizer: the run was trained on bytes"),
        ("other", SPM, "is not the run's tokenizer: give --assets_from the directory"),
        ("same", SPM, "wrote {}\n"),
    ],
)
def test_the_tokenizer_of_a_run(source, tmp_path, monkeypatch, capsys, tokenizer, assets, message):
    """Another one is refused, with which the exported model would not stop; none is named."""
    run = tmp_path / "run"
    (run / "checkpoints" / "8").mkdir(parents=True)
    config, stored, parameters = hf_parameters(source)
    fingerprint = load_tokenizer(SPM).fingerprint if tokenizer == "same" else tokenizer
    checkpoint = types.SimpleNamespace(
        config=config, tokenizer=fingerprint, lora=None, parameters=lambda: parameters
    )
    monkeypatch.setattr(convert, "read_checkpoint", lambda _: checkpoint)
    flags = [f"--assets_from={assets}"] if assets else []
    status = convert.main([str(run), str(tmp_path / "dst"), *flags])
    captured = capsys.readouterr()
    assert message.format(tmp_path / "dst") in captured.out + captured.err
    assert status == int("is not the run's" in message)
    assert (tmp_path / "dst").exists() == (status == 0)


@pytest.mark.parametrize("text", ["[]", '"x"', "null", '{"a": ' + "[" * 100_000])
def test_a_config_that_is_no_object_is_one_line(source, tmp_path, capsys, text):
    (source / "config.json").write_text(text)
    assert convert.main([str(source), str(tmp_path / "dst")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "config.json" in err and err.count("\n") == 1
