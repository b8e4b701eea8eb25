"""What a run says as it begins: what it chose, what it trains on, what attention runs."""

import jax

from train.attention import dispatch_line
from train.config.config import Config
from train.data import Batch, Loader
from train.log import note, say
from train.metrics.evaluate import Sets
from train.run.resolve import Settled


def introduce(config: Config, settled: Settled) -> None:
    """Says what was chosen, and the memory plan."""
    mesh = " x ".join(f"{name} {size}" for name, size in settled.mesh.shape.items())
    for line in settled.notes:
        say(line)
    say(
        f"{settled.name}{' from random weights' * (settled.weights is None)}: "
        f"{settled.model.num_params():,} parameters on {jax.device_count()} "
        f"{settled.mesh.devices.flat[0].device_kind} ({mesh}), {settled.dtype} compute; "
        f"{settled.rows} rows x {config.seq_len} tokens a step in {config.grad_accum} parts; "
        f"peak learning rate {settled.lr:g}; tokenizer {settled.tokenizer.name}"
    )
    say(f"memory plan: {settled.plan}")


def say_data(loader: Loader, val: Sets) -> None:
    """Says what is trained on, what is validated on, and what of it was left out."""
    say(loader.report)
    for line in loader.report.notes():
        say(line)
    for name, of_val in val.items():
        say(f"validation on {name}: {of_val.report}")
        for line in of_val.report.notes():
            say(line)


def say_dispatch(config: Config, settled: Settled, batch: Batch) -> None:
    """Says which attention runs on a batch, and why; the progress bar stays below."""
    micro = batch.segment_ids[: settled.rows // config.grad_accum]
    note(dispatch_line(config.attn, settled.model, settled.mesh, micro, dtype=settled.dtype))
