"""Sidecar files: links, eos ids, the run's tokenizer; output directories are complete or absent."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest

from models.byte_tokenizer import ByteTokenizer
from models.config import NO_ID, PRESETS
from models.tokenizer import load_tokenizer
from models.weights.sidecar_files import (
    check_tokenizer,
    copy_sidecar_files,
    generation_config,
    new_directory,
    sidecar_config,
)

CHAT = Path(__file__).parents[2] / "data" / "tokenizer_tiny_spm"
NANO = PRESETS["nano"]


@pytest.fixture
def base(tmp_path):
    """Make the tokenizer of CHAT without its chat tokens."""
    shutil.copytree(CHAT, tmp_path / "base")
    config = json.loads((CHAT / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        k: v for k, v in config["added_tokens_decoder"].items() if int(k) < 3
    }
    del config["additional_special_tokens"], config["chat_template"]
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "special_tokens_map.json").unlink()
    return tmp_path / "base"


def test_links_out_of_the_directory_are_left_out_and_named(tmp_path, caplog):
    source = tmp_path / "src"
    source.mkdir()
    (tmp_path / "secret").write_text("root")
    (source / "LICENSE").write_text("Apache")
    (source / "inside.txt").symlink_to("LICENSE")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    (source / "up.txt").symlink_to("../secret")
    (tmp_path / "dst").mkdir()
    with caplog.at_level(logging.WARNING):
        copy_sidecar_files(source, tmp_path / "dst")
    assert {p.name for p in (tmp_path / "dst").iterdir()} == {"LICENSE", "inside.txt"}
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        f"left out {source / 'notes.txt'}",
        f"left out {source / 'up.txt'}",
    ]


def test_links_into_the_blobs_of_the_hub_are_followed(tmp_path):
    """A snapshot of the hub's cache consists of links to its blobs; other links are left out."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "1f").write_text("Apache")
    (tmp_path / "models--a--b" / "refs").write_text("main")
    (snapshot / "LICENSE").symlink_to("../../blobs/1f")
    (snapshot / "refs").symlink_to("../../refs")
    (tmp_path / "dst").mkdir()
    copy_sidecar_files(snapshot, tmp_path / "dst")
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["LICENSE"]


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_an_integer_factor_is_written_as_a_float(tmp_path, key):
    """The original refuses an integer."""
    hf = NANO.to_hf()
    del hf["rope_scaling"]
    hf |= {key: {"type": "dynamic", "factor": 2}, "more": 1}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    written = sidecar_config(tmp_path, NANO, dtype="float32")
    assert written["more"] == 1
    assert isinstance(written[key]["factor"], float) and written[key]["factor"] == 2


def test_no_eos_id_outside_of_the_vocabulary(tmp_path):
    """Nor the internal number for no eos."""
    with pytest.raises(ValueError, match="eos_token_id=510 .* vocabulary of 320: .*--assets_from"):
        generation_config(CHAT, NANO)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 320]}')
    with pytest.raises(ValueError, match="eos_token_id=320"):
        generation_config(tmp_path, NANO)
    without = dataclasses.replace(NANO, eos_token_id=NO_ID)
    assert generation_config(None, without)["eos_token_id"] is None


def test_the_tokenizer_of_the_run_is_the_only_one_that_goes_along(base, tmp_path):
    """A bare tokenizer.model is the same as its directory: it gives the same ids."""
    run = load_tokenizer(CHAT).fingerprint
    check_tokenizer(run, CHAT)
    assert load_tokenizer(CHAT / "tokenizer.model").fingerprint == run
    check_tokenizer(None, base)
    check_tokenizer(run, tmp_path)  # no tokenizer in it
    with pytest.raises(ValueError, match="base is not the run's tokenizer: give --assets_from"):
        check_tokenizer(run, base)
    with pytest.raises(ValueError, match="trained on bytes, so leave --assets_from out"):
        check_tokenizer(ByteTokenizer().fingerprint, CHAT)


def test_what_a_killed_conversion_left_is_removed(tmp_path):
    left = tmp_path / ".dst.partial"
    (left / "params").mkdir(parents=True)
    (left / "weights").write_text("half")
    with new_directory(tmp_path / "dst") as partial:
        (partial / "config.json").write_text("{}")
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["config.json"]


def test_two_conversions_do_not_write_one_directory(tmp_path):
    with new_directory(tmp_path / "dst") as partial:
        (partial / "mine").touch()
        with pytest.raises(FileExistsError, match="another process is writing"):
            with new_directory(tmp_path / "dst"):
                pass
        assert (partial / "mine").exists()
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["mine"]
