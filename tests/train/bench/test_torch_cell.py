"""PyTorch's cells compute the same step: targets, documents, parts of a batch."""

import dataclasses
import importlib.util

import numpy as np
import pytest

from tests.train.cells import CELL
from train.bench.shapes import random_rows

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None,
        reason="needs PyTorch: pip install -e '.[torch]'",
    ),
    pytest.mark.filterwarnings("default"),  # those of another project
]
SDPA = dataclasses.replace(CELL, attn="torch_sdpa", remat=None)


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Import PyTorch here: every process that collects this file would need seconds for it."""
    global torch, torch_cell
    import torch

    from train.bench import torch_cell


@pytest.mark.parametrize("attn", ["torch_sdpa", "torch_eager"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_documents_are_alone(attn, remat):
    """The loss of a packed row is the mean over its documents, each computed by itself."""
    torch.manual_seed(0)
    model = torch_cell.make_model(dataclasses.replace(SDPA, attn=attn, remat=remat), "cpu")
    batch = random_rows(1, 24, 300, packed=False)
    ids = np.repeat([[1, 2, 0]], [10, 8, 6], axis=1).astype(np.int32)
    learned = (ids > 0).astype(np.float32)
    batch = batch._replace(segment_ids=ids, loss_mask=learned)
    packed = model(**torch_cell.inputs(batch, "cpu", torch.float32)).loss
    total = torch.zeros(())
    for begin, end in ((0, 10), (10, 18)):
        logits = model(input_ids=torch.as_tensor(batch.tokens[:, begin:end]).long()).logits
        targets = torch.as_tensor(batch.targets[0, begin:end]).long()
        total += torch.nn.functional.cross_entropy(logits[0], targets, reduction="sum")
    # positions of the second document here go on from the first: rotary scores are relative
    torch.testing.assert_close(packed, total / 18, rtol=1e-4, atol=1e-4)


def test_liger_takes_the_ends_of_documents():
    """Rows [B, T] are one row; padding is a document; rows of one document stay as they are."""
    batch = random_rows(2, 24, 300, packed=True)
    ids = np.repeat([[1, 2, 0], [1, 1, 2]], [10, 8, 6], axis=1).astype(np.int32)
    of_batch = batch._replace(segment_ids=ids)
    found = torch_cell.inputs(of_batch, "cpu", torch.float32, torch_cell.LIGER)
    for side in "qk":
        assert found[f"cu_seq_lens_{side}"].tolist() == [0, 10, 18, 24, 42, 48]
        assert found[f"max_length_{side}"] == 18
    assert found["input_ids"].tolist() == [batch.tokens.reshape(-1).tolist()]
    assert "attention_mask" not in found
    one = torch_cell.inputs(
        batch._replace(segment_ids=None), "cpu", torch.float32, torch_cell.LIGER
    )
    assert one["input_ids"].shape == (2, 24) and "cu_seq_lens_q" not in one


def test_measures(monkeypatch):
    found = torch_cell.measure(dataclasses.replace(SDPA, rows="packed"))
    assert found["ms"] > 0 and found["remat"] == "none" and found["grad_accum"] == 1
    assert found["tokens_per_second"] == pytest.approx(64e3 / found["ms"])
    assert np.isfinite(found["loss"]) and found["peak_memory_bytes"] > 0


def test_out_of_memory_takes_the_next_way(monkeypatch):
    """Gradient checkpointing, then the rows in parts, then a line."""
    tried, room = [], 2

    def measure(cell, work, grad_accum, device):
        tried.append((cell.remat, grad_accum))
        if grad_accum < room:
            raise torch.OutOfMemoryError("no")
        return {"ms": 1.0}

    monkeypatch.setattr(torch_cell, "_measure", measure)
    assert torch_cell.measure(SDPA) == {"ms": 1.0}
    assert tried == [("none", 1), ("full", 1), ("full", 2)]
    room = 4
    assert "out of memory" in torch_cell.measure(SDPA)["why"]


def test_a_batch_in_parts_is_the_same_step():
    whole = random_rows(4, 16, 300, packed=False)
    parts = list(torch_cell._parts(whole, 2))
    rows = np.concatenate([part.tokens for part in parts])
    assert len(parts) == 2 and sorted(map(tuple, rows)) == sorted(map(tuple, whole.tokens))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"remat": "dots"}, "not dots"),
        ({"state": "int8"}, "in the type of the weights"),
        ({"optim": "lion"}, "in the type of the weights"),
        ({"grad_accum": 2}, "have no --grad_accum"),
        ({"dtype": "bfloat16"}, "finds no CUDA GPU"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_said(fields, why):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert why in torch_cell.measure(dataclasses.replace(SDPA, **fields))["why"]
