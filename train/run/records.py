"""What a run leaves behind besides checkpoints: metrics, curves, samples, a trace."""

import contextlib
from typing import Any

import jax
from flax import nnx

from train.config.config import Config
from train.config.window import parse_window
from train.log import note
from train.metrics.evaluate import perplexity
from train.metrics.metrics import Metrics, Part
from train.metrics.profile import Profile
from train.metrics.samples import Sampler, read_prompts
from train.metrics.sinks import open_sinks
from train.run.flatten import resolved
from train.run.resolve import Settled
from train.step.state import TrainState


class Evidence:
    """The records of one run, opened together and closed together."""

    def __init__(self, config: Config, settled: Settled, graphdef: nnx.GraphDef, start: int):
        """Opens the files of the run's directory, which exists; what is after `start` is dropped.

        Args:
            config: what to record, and how often.
            settled: the model, the tokenizer, the directory.
            graphdef: the model's, from `train.step.state.abstract_state`.
            start: step the run goes on from.

        Raises:
            ValueError, NotImplementedError, OSError: what cannot be recorded.
        """
        if config.sample_every and jax.process_count() > 1:
            raise NotImplementedError("--sample_every needs a single process: leave it out")
        out = settled.out
        self._sampler = Sampler(
            read_prompts(config.prompts) if config.sample_every else (),
            chat=config.chat,
            graphdef=graphdef,
            tokenizer=settled.tokenizer,
            path=out / "samples.jsonl",
            start=start,
        )
        self._sample_every, self._steps = config.sample_every, config.steps
        window = parse_window(config.profile) if config.profile else None
        self._profile = Profile(window, out / "profile")
        first = jax.process_index() == 0
        self._sinks = open_sinks(
            config.log if first else (), out, start=start, settings=resolved(config)
        )
        self._metrics = Metrics(
            out / "metrics.jsonl",
            model=settled.model,
            start=start,
            steps=config.steps,
            log_every=config.log_every,
            positions=settled.rows * config.seq_len,
            sinks=self._sinks,
        )

    def timed(self, part: Part, *, after: Any = None) -> contextlib.AbstractContextManager[None]:
        """Counts the time inside as spent on `part`; as `Metrics.timed`."""
        return self._metrics.timed(part, after=after)

    def before(self, step: int, state: TrainState) -> None:
        """To be called before a step is sent off."""
        self._profile.before(step, state)

    def after(self, step: int, state: TrainState, losses: dict[str, float]) -> None:
        """To be called after it: ends a trace, samples, passes validation losses on."""
        if self._profile.after(step, state):
            note(f"wrote the trace of the profiled steps after step {step}")
        for name, loss in losses.items():
            values = {"loss": loss, "perplexity": perplexity(loss)}
            for sink in self._sinks:
                sink.write(step, {f"validation/{name}/{k}": v for k, v in values.items()})
        if self._sample_every and (step % self._sample_every == 0 or step == self._steps):
            with self.timed("evaluation", after=state):
                for text in self._sampler(step, state.params):
                    note(f"step {step} says: {text!r}")

    def record(self, step: int, values: dict[str, jax.Array], pairs: int) -> dict[str, Any]:
        """Waits for a step's values, shows and writes them; as `Metrics.record`."""
        return self._metrics.record(step, values, pairs)

    def close(self) -> None:
        """Ends everything."""
        self._profile.close()
        self._metrics.close()
