"""A cell of the bench that a CPU runs in seconds."""

from train.bench.shapes import Cell

CELL = Cell(
    model="nano",
    attn="xla",
    seq_len=32,
    tokens=64,
    rows="dense",
    mesh=None,
    remat="full",
    scan_layers=True,
    tile_size=None,
    dtype="float32",
    matmul="bf16",
    param_dtype="fp32",
    optim="adamw",
    state="fp32",
    lora_rank=None,
    base_dtype=None,
    grad_accum=1,
    z_loss=0.0,
    deterministic=False,
    repeats=1,
    data=(),
    tokenizer="byte",
)
