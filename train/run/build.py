"""Build the parts of a run: data loaders, model, compiled step, initial weights."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from models import load
from models.internlm2 import InternLM2, init
from models.lora import with_adapter_params
from models.tokenizer import Tokenizer
from models.weights.train_checkpoint import read_adapter
from train.cache_dirs import token_cache
from train.checkpoint.checksum import all_finite
from train.config.sections import DataConfig
from train.data.loader import Loader, Shard
from train.data.open import open_data
from train.data.pack.mixture import parse_source
from train.data.pack.stream import Packing
from train.data.tokens.cache import ReadOptions
from train.distributed.device import compiler_options
from train.distributed.hosts import share
from train.run.resolve import Run
from train.step.lr_schedule import schedule
from train.step.optim import optimizer
from train.step.state import Params, TrainState, abstract_state, params_of
from train.step.step import batch_struct, compile_step, make_step
from train.step.update import by_layer

log = logging.getLogger(__name__)


def open_training(run: Run) -> Loader:
    """Open the training data."""
    data = run.config.data
    return _open(run, data.files, hold_out=data.hold_out)


def open_validation(run: Run) -> Iterator[tuple[str, Loader]]:
    """Yield (name, loader) of every validation set.

    Validation documents are never split, whatever the packing of the training data, so that losses
    of runs can be compared.
    """
    data = run.config.data
    if data.hold_out:
        yield "held_out", _open(run, data.files, method="fit", hold_out=data.hold_out, split="val")
        return
    for file in data.val or ():
        yield parse_source(file).path.stem, _open(run, (file,), method="fit")


def _open(run: Run, files: tuple[str, ...] | None, **options) -> Loader:
    """Open files as batches of this run, with the rows of this process."""
    index, count = share(run.real_mesh)
    return open_packed(
        run.config.data,
        files,
        run.tokenizer,
        seq_len=run.config.seq_len,
        batch_size=run.rows,
        seed=run.config.seed,
        shard=Shard(index, count),
        **options,
    )


def open_packed(
    data: DataConfig,
    files: tuple[str, ...] | None,
    tokenizer: Tokenizer,
    method: Packing | None = None,
    **options,
) -> Loader:
    """Open files, or the built-in text for None, with the options of --data.

    Args:
        data: Options.
        files: Files, which need not be those of `data`.
        tokenizer: Tokenizer.
        method: Packing; by default that of `data`.
        **options: Further arguments of `train.data.open.open_data`.
    """
    cache = Path(data.cache) if data.cache else token_cache()
    return open_data(
        files,
        tokenizer,
        packing=method or data.packing,
        too_long=data.too_long,
        reading=ReadOptions(strict=data.strict, reasoning=data.reasoning, cache=cache),
        **options,
    )


def check_rows_for_attention(run: Run, *loaders: Loader) -> None:
    """Check that each row holds one document, where attention has no document mask.

    Raises:
        ValueError: A row holds several.
    """
    for loader in loaders:
        if not run.packed and (pieces := len(loader.lengths)) > loader.report.rows:
            raise ValueError(
                f"--attn=cudnn has no document mask, and the data pack {pieces:,} documents into "
                f"{loader.report.rows:,} rows: take --attn=pallas or --attn=xla, or documents of "
                "at least --seq_len tokens"
            )


def abstract_training(
    run: Run,
) -> tuple[optax.GradientTransformationExtraArgs, nnx.GraphDef, TrainState]:
    """Return the optimizer, the graphdef of the model, and the state as ShapeDtypeStructs."""
    # Adapters are float32, whatever the frozen weights are stored in.
    param_dtype = run.execution.param_dtype if run.execution.lora is None else jnp.float32
    tx = optimizer(run.config.optim, run.lr, run.steps, param_dtype=param_dtype)

    def make_model() -> InternLM2:
        return InternLM2(run.model, rngs=nnx.Rngs(params=run.config.seed), execution=run.execution)

    return tx, *abstract_state(make_model, tx, run.real_mesh)


def initial_params(run: Run, like: TrainState) -> Params:
    """Load the weights, or draw random ones, in the shards of `like`.

    Raises:
        ValueError: Loaded weights are not finite.
    """
    execution, seed, mesh = run.execution, run.config.seed, run.real_mesh
    if run.weights is None:
        model = init(run.model, seed=seed, mesh=mesh, execution=execution)
    else:
        model = load(run.weights, execution=execution, mesh=mesh, seed=seed)
        log.info(f"loaded the weights of {run.weights}")
    if adapter := run.config.lora.adapter:
        _, trained = read_adapter(Path(adapter), run.model)
        model = with_adapter_params(model, trained)
        log.info(f"loaded the adapter {adapter}")
    params = params_of(model, like)
    loaded = " and ".join(str(path) for path in (run.weights, adapter) if path)
    with jax.set_mesh(like.mesh):
        if loaded and not all_finite(params):
            raise ValueError(f"{loaded} holds NaN or infinite weights: get the files again")
    return params


def compile_training(
    run: Run,
    tx: optax.GradientTransformationExtraArgs,
    graphdef: nnx.GraphDef,
    like: TrainState,
    sources: int = 1,
) -> jax.stages.Compiled:
    """Compile the training step for the shapes of the run, and log the time that it took.

    Args:
        run: The run.
        tx: From `abstract_training`.
        graphdef: From `abstract_training`.
        like: The state, or its structs.
        sources: Number of sources of the data.
    """
    config = run.config
    batch = batch_struct(
        rows=run.rows,
        seq_len=config.seq_len,
        grad_accum=config.grad_accum,
        mesh=run.real_mesh,
        sources=sources,
    )
    if not run.packed:
        batch = batch._replace(segment_ids=None)
    start = time.perf_counter()
    rate = schedule(config.optim, run.lr, run.steps)
    step = make_step(
        graphdef,
        tx,
        rate,
        spike=config.guard.spike,
        z_loss=config.z_loss,
        dropout_seed=config.seed if config.lora.dropout else None,
        sources=sources,
        layered=by_layer(config.optim, scan=run.execution.scan, lora=config.lora.used),
    )
    options = compiler_options(
        deterministic=config.deterministic, matmul=config.matmul, remat=run.execution.remat
    )
    compiled = compile_step(step, like, batch, options)
    log.info(f"compiled the step in {time.perf_counter() - start:.1f} s")
    return compiled
