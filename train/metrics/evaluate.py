"""Validation: the mean loss of each named set, every `eval_every` steps.

B row of a microbatch, T position; a `Batch` has arrays [A, B, T] here.
"""

import functools
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from train.data.loader import Loader
from train.data.pack.packing import Batch
from train.metrics.records import Records
from train.step.loss import cross_entropy
from train.step.state import Params
from train.step.step import put_batch

log = logging.getLogger(__name__)

Sets = dict[str, Loader]
"""Loaders by name of the validation set."""


class Evaluation:
    """Compute the losses of the validation sets and write them to eval.jsonl.

    A line has step, set, loss (the mean over the set's loss tokens), perplexity and loss_tokens.
    """

    def __init__(
        self,
        sets: Sets,
        graphdef: nnx.GraphDef,
        *,
        grad_accum: int,
        mesh: Mesh,
        path: Path,
        start: int,
        options: dict[str, bool | int] | None = None,
    ):
        """Open eval.jsonl at `path`; lines of steps after `start` are removed.

        Each evaluation reads every row of the sets once, in `grad_accum` microbatches a batch. The
        graphdef is the model's, from `train.step.state.abstract_state`; the options are those of
        `train.distributed.device.compiler_options`.
        """
        self._sets, self._grad_accum, self._mesh = sets, grad_accum, mesh
        self._sums = jax.jit(functools.partial(sums, graphdef), compiler_options=options)
        self._records = Records(path, start=start)

    def __call__(self, step: int, params: Params) -> dict[str, float]:
        """Evaluate all sets after `step` steps; log, record and return the losses."""
        losses = {}
        for name, loader in self._sets.items():
            total = count = 0.0
            for host_batch in loader.one_epoch():
                with jax.set_mesh(self._mesh):
                    batch = put_batch(host_batch, grad_accum=self._grad_accum, mesh=self._mesh)
                    of_batch = self._sums(params, batch)
                total, count = total + float(of_batch[0]), count + float(of_batch[1])
            losses[name] = total / count
            line = {"step": step, "set": name, "loss": losses[name], "loss_tokens": int(count)}
            line["perplexity"] = perplexity(losses[name])
            self._records.write(line)
            text = f"loss {losses[name]:.4f}, perplexity {line['perplexity']:.2f} on {name}"
            log.info(f"step {step}: {text}")
        return losses


def perplexity(loss: float) -> float:
    """Return exp(loss), or the largest float where exp overflows."""
    return math.exp(min(loss, 709.0))


def sums(graphdef: nnx.GraphDef, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return (sum of losses, loss tokens) of a batch [A, B, T], float32."""
    model, total = nnx.merge(graphdef, params), jnp.float32(0)
    for a in range(batch.tokens.shape[0]):
        micro = jax.tree.map(lambda x, a=a: x[a], batch)
        x_BTD = model.hidden(micro.tokens, positions=micro.positions, segment_ids=micro.segment_ids)
        total += cross_entropy(x_BTD, model.unembedding(), micro.targets, micro.loss_mask)
    return total, jnp.sum(batch.loss_mask)


class OpenSets(ExitStack):
    """Named loaders that are closed together."""

    def __init__(self, loaders: Iterator[tuple[str, Loader]]):
        """Open the loaders; a name that is taken gets a number."""
        super().__init__()
        self.sets: Sets = {}
        for name, loader in loaders:
            self.enter_context(loader)
            again = sum(known.split("#")[0] == name for known in self.sets)
            self.sets[f"{name}#{again + 1}" if again else name] = loader
