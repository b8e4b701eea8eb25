"""Export the weights of a run while it trains: HF directories, or PEFT directories of adapters."""

import contextlib
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from models.byte_tokenizer import ByteTokenizer
from models.lora import adapter_params
from models.tokenizer import load_tokenizer
from models.weights.adapter_files import write_adapter
from models.weights.save import snapshot_hf
from models.weights.sidecar_files import generation_config
from train.checkpoint.checksum import all_finite
from train.checkpoint.exports import Exports, Write
from train.run.resolve import Run
from train.step.state import TrainState

log = logging.getLogger(__name__)

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def export_assets(run: Run) -> Path | None:
    """Find the tokenizer, code and other files beside exported weights, and check them.

    Returns:
        The directory of the initial weights, or else that of --tokenizer; None for adapters, and
        where neither directory has the tokenizer of the run.

    Raises:
        ValueError: an end-of-sequence id is outside of the vocabulary.
        OSError: a file cannot be read.
    """
    if not run.config.export_every or run.execution.lora is not None:
        return None
    named, found = run.config.tokenizer, None
    for directory in (run.weights, Path(named) if named else None):
        if directory is not None and directory.is_dir():
            with contextlib.suppress(ValueError, OSError):  # none
                if load_tokenizer(directory).fingerprint == run.tokenizer.fingerprint:
                    found = directory
    generation_config(found, run.model)
    if found is None and run.tokenizer.fingerprint != ByteTokenizer.fingerprint:
        log.warning(f"exports get no tokenizer: copy the files of {run.tokenizer.name} there")
    return found


def restore_export(run: Run, exports: Exports, start: int, export: Callable[[], None]) -> None:
    """Write the export of the step from which a run resumes, if it is missing.

    If the process is killed after a checkpoint but before its export is complete, only the
    checkpoint exists. Of an earlier step there are no weights any more: a line in the log says so.

    Args:
        run: The run.
        exports: Its exports, after `Exports.begin`.
        start: Step from which the run resumes; above 0.
        export: Begins an export of that step's weights.
    """
    every = run.config.export_every
    due = start if start == run.steps else start // every * every
    if exports.latest() >= due:
        return
    if due == start:
        log.info(f"step {start} has a checkpoint and no export: the export is written now")
        export()
    else:
        following = min(due + every, run.steps)
        log.info(
            f"there is no export of step {due}, and no checkpoint to write it from; the next "
            f"export is of step {following}"
        )


def take_export(run: Run, assets: Path | None, graphdef: nnx.GraphDef, state: TrainState) -> Write:
    """Copy the weights to host memory; return the function that writes them.

    All processes call this together. The copy is divided between them.

    Args:
        run: The run.
        assets: From `export_assets`.
        graphdef: From `train.step.state.abstract_state`.
        state: The state of a step.

    Raises:
        FloatingPointError: the weights are not finite.
        ValueError: a weight overflows in --export_dtype.
    """
    config = run.config
    with jax.set_mesh(state.mesh):
        if not all_finite(state.params):
            raise FloatingPointError(
                f"weights are not finite after step {int(state.step)}, which is not exported; "
                "start again with a smaller --optim.lr"
            )
    model = nnx.merge(graphdef, state.weights)
    layout = run.layout or "internlm2"
    if run.execution.lora is None:
        return snapshot_hf(
            model,
            dtype=DTYPES[config.export_dtype or "bf16"],
            layout=layout,
            assets_from=assets,
            part=jax.process_index(),
            parts=jax.process_count(),
        )
    everywhere = NamedSharding(run.real_mesh, PartitionSpec())
    # Copied: the next step reuses the memory of the state.
    pairs = jax.tree.map(
        lambda x: np.array(jax.device_put(x, everywhere)), dict(adapter_params(model))
    )
    if jax.process_index():
        return lambda directory: None
    return functools.partial(
        write_adapter,
        config=run.model,
        lora=run.execution.lora,
        params=pairs,
        base=run.name,
        layout=layout,
        dtype=DTYPES[config.export_dtype or "fp32"],
    )
