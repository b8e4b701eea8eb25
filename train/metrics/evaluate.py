"""Validation: the mean loss of each named set, every `eval_every` steps.

B row of a microbatch, T position; a `Batch` has arrays [A, B, T] here.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from train.data import Batch, Loader
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
        """Open the records; lines after `start`, of a run that was killed, are dropped.

        Args:
            sets: validation sets; each evaluation reads every row once.
            graphdef: the model's, from `train.step.state.abstract_state`.
            grad_accum: microbatches of a batch.
            mesh: the devices.
            path: of eval.jsonl; its directory must exist if there are sets.
            start: step the run resumes from.
            options: compiler options, from `train.distributed.device.compiler_options`.
        """
        self._sets, self._grad_accum, self._mesh = sets, grad_accum, mesh
        self._sums = jax.jit(make_sums(graphdef), compiler_options=options)
        writes = bool(sets) and jax.process_index() == 0
        self._records = Records(path, start=start) if writes else None

    def __call__(self, step: int, params: Params) -> dict[str, float]:
        """Evaluate all sets after `step` steps; log, record and return the losses."""
        losses = {}
        for name, loader in self._sets.items():
            total = count = 0.0
            for batch in loader.one_epoch():
                sums = self._on_devices(params, batch)
                total, count = total + float(sums[0]), count + float(sums[1])
            losses[name] = total / count
            line = {"step": step, "set": name, "loss": losses[name], "loss_tokens": int(count)}
            line["perplexity"] = perplexity(losses[name])
            if self._records is not None:
                self._records.write(line)
            text = f"loss {losses[name]:.4f}, perplexity {line['perplexity']:.2f} on {name}"
            log.info(f"step {step}: {text}")
        return losses

    def _on_devices(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        with jax.set_mesh(self._mesh):
            return self._sums(
                params, put_batch(batch, grad_accum=self._grad_accum, mesh=self._mesh)
            )


def perplexity(loss: float) -> float:
    """Return exp(loss), or the largest float where exp overflows."""
    return math.exp(min(loss, 709.0))


def make_sums(graphdef: nnx.GraphDef) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """Return a function (params, batch [A, B, T]) -> (sum of losses, loss tokens), float32."""

    def of_micro(params: Params, micro: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        x_BTD = model.hidden(micro.tokens, positions=micro.positions, segment_ids=micro.segment_ids)
        return cross_entropy(x_BTD, model.unembedding(), micro.targets, micro.loss_mask)

    def sums(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        total = jnp.float32(0)
        for a in range(batch.tokens.shape[0]):
            total += of_micro(params, jax.tree.map(lambda x, a=a: x[a], batch))
        return total, jnp.sum(batch.loss_mask)

    return sums


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
