"""Validation: the mean loss of each named set, every so many steps.

B row of a microbatch, T position; a `Batch` has arrays [A, B, T] here.
"""

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
from train.log import note
from train.metrics.records import Records
from train.step.loss import cross_entropy
from train.step.state import Params
from train.step.step import put_batch

Sets = dict[str, Loader]
"""Loaders by the name of their set."""


class Evaluation:
    """Computes the losses of the sets and writes them to eval.jsonl.

    A line of it has step, set, loss (the mean over the set's loss tokens), perplexity, loss_tokens.
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
        options: dict[str, bool] | None = None,
    ):
        """Lines after `start`, of a run that died, are dropped.

        Args:
            sets: what to evaluate on; every row of each, once.
            graphdef: the model's, from `train.step.state.abstract_state`.
            grad_accum: microbatches of a batch.
            mesh: the devices.
            path: of eval.jsonl; there only if there are sets.
            start: step the run goes on from.
            options: for the compiler, as `train.distributed.device.compiler_options` has them.
        """
        self._sets, self._grad_accum, self._mesh = sets, grad_accum, mesh
        self._sums = jax.jit(make_sums(graphdef), compiler_options=options)
        writes = bool(sets) and jax.process_index() == 0
        self._records = Records(path, start=start) if writes else None

    def __call__(self, step: int, params: Params) -> dict[str, float]:
        """Evaluates all sets after `step` steps, says and writes the losses, and returns them."""
        losses = {}
        for name, loader in self._sets.items():
            total = count = 0.0
            for batch in loader.once():
                sums = self._on_devices(params, batch)
                total, count = total + float(sums[0]), count + float(sums[1])
            losses[name] = total / count
            line = {"step": step, "set": name, "loss": losses[name], "loss_tokens": int(count)}
            line["perplexity"] = perplexity(losses[name])
            if self._records is not None:
                self._records.write(line)
            said = f"loss {losses[name]:.4f}, perplexity {line['perplexity']:.2f} on {name}"
            note(f"step {step}: {said}")
        return losses

    def _on_devices(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        with jax.set_mesh(self._mesh):
            return self._sums(
                params, put_batch(batch, grad_accum=self._grad_accum, mesh=self._mesh)
            )


def perplexity(loss: float) -> float:
    """exp(loss), at most the largest float, so that it can be written as JSON."""
    return math.exp(min(loss, 709.0))


def make_sums(graphdef: nnx.GraphDef) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """Makes (params, batch [A, B, T]) -> (sum of losses, loss tokens), float32 scalars."""

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
        """Opens them; a name that is taken gets a number."""
        super().__init__()
        self.sets: Sets = {}
        for name, loader in loaders:
            self.enter_context(loader)
            again = sum(known.split("#")[0] == name for known in self.sets)
            self.sets[f"{name}#{again + 1}" if again else name] = loader
