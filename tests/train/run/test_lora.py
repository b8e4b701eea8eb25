"""Runs with adapters: only adapters are trained, saved and exported; resuming is exact."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.convert import convert
from models.execution import Execution
from models.internlm2 import init
from models.lora import LoRA, adapter_params
from models.weights.adapter_files import load_adapter
from models.weights.load import load
from models.weights.save import save_hf
from models.weights.table import find_param, table
from tests.train.runs import losses, params
from train.config.config import Config
from train.config.sections import LoRAConfig, OptimConfig
from train.run import loop, train_loop
from train.run.loop import run

RANK = 2
QLORA = {"base_dtype": "int8"}  # nf4 wants input axes of 64, which the tiny model lacks


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    """HF directories of two base models."""
    directory = tmp_path_factory.mktemp("bases")
    for name, seed in (("one", 1), ("other", 2)):
        model = init(tiny, seed=seed, execution=Execution(dtype=jnp.float32))
        save_hf(model, directory / name)
    return directory


@pytest.fixture
def config(base, monkeypatch):
    monkeypatch.setattr(loop, "write_sample", lambda *_: None)

    def make(out, **changes) -> Config:
        lora = changes.pop("lora", LoRAConfig(rank=RANK, alpha=4.0, dropout=0.1))
        values = {
            "model": str(base / "one"),
            "tokenizer": "byte",
            "attn": "xla",
            "seq_len": 64,
            "batch_size": 8,
            "grad_accum": 1,
            "steps": 4,
            "save_every": 2,
            "optim": OptimConfig(lr=1e-2),
            "out": str(out),
        }
        return Config(lora=lora, **values | changes)

    return make


def test_trains_saves_and_exports_adapters_alone(config, base, tiny, tmp_path):
    """The loss falls; the checkpoint has no weights of the base; PEFT files have the adapters."""
    out = tmp_path / "run"
    run(config(out, steps=8, export_every=2))
    assert losses(out)[-1] < losses(out)[0] - 0.02
    saved = params(out, 8)
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(saved)}
    assert names and all("['lora']" in name for name in names)
    assert sorted(p.name for p in (out / "export").iterdir()) == ["step-6", "step-8"]
    lora, arrays = load_adapter(out / "export" / "step-8", tiny)
    assert lora == LoRA(rank=RANK, alpha=4.0, dropout=0.1)
    np.testing.assert_array_equal(arrays["w1"][0], saved["blocks"]["ffn"]["lora"]["w1"]["a"])


@pytest.mark.parametrize("changes", [{}, QLORA], ids=["lora", "int8"])
def test_resuming_is_exact(config, tmp_path, monkeypatch, changes):
    """Stopped after 3 of 4 steps, with dropout: the same losses and adapters bit for bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(config(whole, **changes))
    with monkeypatch.context() as patch:
        put_batch, calls = train_loop.put_batch, []

        def put(*args, **kwargs):
            calls.append(1)
            if len(calls) == 4:
                raise OSError("stopped")
            return put_batch(*args, **kwargs)

        patch.setattr(train_loop, "put_batch", put)
        with pytest.raises(OSError, match="stopped"):
            run(config(parts, **changes))
    run(config(parts, **changes))
    assert losses(parts) == losses(whole)
    jax.tree.map(np.testing.assert_array_equal, params(parts, 4), params(whole, 4))


def test_another_base_is_refused(config, base, tmp_path):
    """A run goes on only on its own base, and names both."""
    out = tmp_path / "run"
    run(config(out))
    with pytest.raises(ValueError, match="weights"):
        run(config(out, model=str(base / "other"), steps=6))
    with pytest.raises(ValueError, match="lora"):
        run(config(out, lora=LoRAConfig(rank=RANK + 1, alpha=4.0), steps=6))


def test_an_adapter_is_exported_merged_and_continued(config, base, tiny, tmp_path, exact_products):
    """Convert writes a PEFT directory, or whole weights that compute the same as both together.

    The positions that --rope_factor adds are those of the run, not of its base.
    """
    out, tokens = tmp_path / "run", np.arange(48).reshape(2, 24) % 320
    run(config(out, rope_factor=7.0))
    remark = convert(out, tmp_path / "adapter")
    assert "PEFT adapter" in remark and str(base / "one") in remark
    options = Execution(dtype="float32", param_dtype="float32", attn="xla")
    both = load(base / "one", execution=options, adapter=tmp_path / "adapter")
    assert any(np.asarray(b).any() for _, b in adapter_params(both).values())
    convert(out, tmp_path / "merged", merge=base / "one")
    convert(tmp_path / "adapter", tmp_path / "again", merge=base / "one")
    merged = load(tmp_path / "merged", execution=options)
    logits = jax.jit(lambda model: model(tokens))
    np.testing.assert_allclose(np.asarray(logits(merged)), np.asarray(logits(both)), atol=1e-5)
    again = load(tmp_path / "again", execution=options)
    for weight in table(tiny):
        pair = (getattr(*find_param(m, weight.path)).get_value() for m in (merged, again))
        np.testing.assert_array_equal(*map(np.asarray, pair))
    of_run = load(out, execution=options)  # the adapters with their base
    np.testing.assert_array_equal(np.asarray(logits(of_run)), np.asarray(logits(both)))
    for extended in (merged, of_run):
        scaling = extended.config.rope_scaling
        assert scaling is not None and scaling.factor == 7.0
    more, advice = tmp_path / "more", f"take --model={base / 'one'} --lora.adapter={out};"
    with pytest.raises(ValueError, match=f"is a run with adapters: .*{re.escape(advice)}"):
        run(config(more, model=str(out)))
    run(config(more, lora=LoRAConfig(adapter=str(out)), steps=1))
    assert losses(more)[0] < losses(out)[0]
    assert json.loads((more / "config.json").read_text())


def test_another_base_cannot_be_merged(config, base, tiny, tmp_path):
    out = tmp_path / "run"
    run(config(out))
    wider = dataclasses.replace(tiny, intermediate_size=96)
    save_hf(init(wider, execution=Execution(dtype=jnp.float32)), tmp_path / "wider")
    with pytest.raises(ValueError, match="is another base model: intermediate_size differ"):
        convert(out, tmp_path / "merged", merge=tmp_path / "wider")


@pytest.fixture
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield
