"""Record a run besides its checkpoints: metrics, validation curves, samples, a profiler trace."""

import contextlib
import logging
from typing import Any

import jax
from flax import nnx

from train.config.config import Config
from train.metrics.evaluate import perplexity
from train.metrics.metrics import Metrics, Part
from train.metrics.profile import Profile
from train.metrics.samples import Sampler, read_prompts
from train.metrics.sinks import open_sinks
from train.run.resolve import Run
from train.run.summary import flatten_config
from train.step.state import TrainState

log = logging.getLogger(__name__)


def check_recorder(config: Config) -> None:
    """Check the prompts before anything is written.

    Raises:
        NotImplementedError: Samples of several processes.
        ValueError, OSError: A file of --prompts cannot be read.
    """
    if not config.sample_every:
        return
    if jax.process_count() > 1:
        raise NotImplementedError("--sample_every needs a single process: leave it out")
    try:
        read_prompts(config.prompts)
    except OSError as error:
        raise ValueError(f"--prompts {error.filename}: {error.strerror}") from error


class Recorder:
    """Write metrics.jsonl, samples.jsonl, sinks and a trace; one object for the train loop."""

    def __init__(self, run: Run, graphdef: nnx.GraphDef, start: int, sources: tuple[str, ...]):
        """Open the files in the run's directory, and drop lines of steps after `start`.

        Args:
            run: The run; its directory exists.
            graphdef: From `train.step.state.abstract_state`.
            start: Step from which the run resumes.
            sources: Names of the training files.

        Raises:
            ValueError, OSError: A file cannot be read or written.
        """
        config, out = run.config, run.out
        self._sampler = Sampler(
            read_prompts(config.prompts) if config.sample_every else (),
            chat=config.chat,
            graphdef=graphdef,
            tokenizer=run.tokenizer,
            path=out / "samples.jsonl",
            start=start,
        )
        self._sample_every, self._steps = config.sample_every, run.steps
        self._profile = Profile(config.profile_window, out / "profile")
        first = jax.process_index() == 0
        self._sinks = open_sinks(
            config.log if first else (), out, start=start, settings=flatten_config(config)
        )
        self._metrics = Metrics(
            out / "metrics.jsonl",
            model=run.model,
            lora=run.execution.lora,
            start=start,
            steps=run.steps,
            log_every=config.log_every,
            positions=run.rows * config.seq_len,
            sources=sources,
            sinks=self._sinks,
        )

    def timed(self, part: Part, *, after: Any = None) -> contextlib.AbstractContextManager[None]:
        """Count the time inside the block as spent on `part`, see `Metrics.timed`."""
        return self._metrics.timed(part, after=after)

    def before_step(self, step: int, state: TrainState) -> None:
        """Start the profiler before the first step of --profile."""
        self._profile.before(step, state)

    def after_step(self, step: int, state: TrainState, losses: dict[str, float]) -> None:
        """Stop the profiler, generate samples, and send validation losses to the sinks."""
        if self._profile.after(step, state):
            log.info(f"wrote the trace of the profiled steps after step {step}")
        for name, loss in losses.items():
            values = {"loss": loss, "perplexity": perplexity(loss)}
            for sink in self._sinks:
                sink.write(step, {f"validation/{name}/{k}": v for k, v in values.items()})
        if self._sample_every and (step % self._sample_every == 0 or step == self._steps):
            with self.timed("evaluation", after=state):
                self._sampler(step, state.weights)

    def record(self, step: int, values: dict[str, jax.Array], pairs: int) -> dict[str, Any]:
        """Wait for the values of a step, show and write them, see `Metrics.record`."""
        return self._metrics.record(step, values, pairs)

    def close(self) -> None:
        """Close the trace, the progress bar and the sinks."""
        self._profile.close()
        self._metrics.close()
