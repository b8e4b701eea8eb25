"""Step metrics: one JSON line per step, and a progress bar or console lines.

The time of a step runs from the end of the step before to its own end, as seen from the host; the
first step's time includes startup waits. A line splits the time: waiting for data, writing
checkpoints, evaluation with samples, and the rest, which is computing. Speeds and MFU are of the
time without checkpoints and evaluation.
"""

import contextlib
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
from tqdm import tqdm

from jaxattn.device import peak_flops
from models.config import ModelConfig
from models.lora import LoRA
from train.metrics.flops import training_flops
from train.metrics.records import Records

Part = Literal["data", "checkpoint", "evaluation"]
PARTS: tuple[Part, ...] = ("data", "checkpoint", "evaluation")
CONSOLE_SECONDS = 10
"""Shortest time between console lines."""

BAR_COLUMNS = 52
"""Columns of the progress bar without the values, up to 6 digits of steps and hours of time."""


@runtime_checkable
class Sink(Protocol):
    """Destination of metrics beside metrics.jsonl (`train.metrics.sinks`)."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the values of a step, by name."""

    def close(self) -> None:
        """Close the sink."""


class Metrics:
    """Record the metrics of each step and show them."""

    def __init__(
        self,
        path: Path,
        *,
        model: ModelConfig,
        start: int,
        steps: int,
        log_every: int,
        positions: int,
        lora: LoRA | None = None,
        sources: Sequence[str] = (),
        sinks: Sequence[Sink] = (),
    ):
        """Open metrics.jsonl at `path`; lines of steps after `start` are removed.

        Args:
            path: of the file.
            model: architecture, for the FLOPs.
            lora: adapters, if only they are trained, for the FLOPs.
            start: step the run resumes from.
            steps: optimizer steps of the whole run.
            log_every: steps between lines; the last step always has a line.
            positions: tokens of a step, padding included.
            sources: names of the training files, in the order of the step's source_losses.
            sinks: further destinations of each line.

        Raises:
            OSError: the file cannot be written.
        """
        self._model, self._lora, self._steps, self._every = model, lora, steps, log_every
        self._positions, self._sources, self._sinks = positions, sources, sinks
        self._devices = jax.local_devices()
        peak = peak_flops(self._devices[0])
        self._peak = None if peak is None else peak * jax.device_count()
        first = jax.process_index() == 0  # other processes only wait for the values
        self._records = Records(path, start=start)
        self._records.write()  # creates the file, which marks the directory as a run's
        watched = sys.stderr.isatty() and first
        self._bar = tqdm(
            total=steps,
            initial=start,
            bar_format="{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
            "{postfix}",
            dynamic_ncols=True,
            disable=not watched,
        )
        self._console_time = None if watched or not first else 0.0  # of the last console line
        self._step_end = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(self, part: Part, *, after: Any = None) -> Iterator[None]:
        """Count the time inside the block for `part` instead of computing.

        Arrays `after` are waited for first; that wait counts as computing.
        """
        jax.block_until_ready(after)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._parts[part] = self._parts.get(part, 0.0) + time.perf_counter() - start

    def record(self, step: int, values: dict[str, jax.Array], pairs: int) -> dict[str, Any]:
        """Wait for the values of a step, record them and show them.

        Args:
            step: optimizer steps done, this one included.
            values: the step's metrics on the device, float32: scalars, and source_losses and
                source_tokens [S] if there are several sources.
            pairs: from `train.metrics.flops.causal_pairs`.

        Returns:
            The line: values; seconds and its parts data_seconds, checkpoint_seconds,
            evaluation_seconds, compute_seconds; tokens_per_second (without padding),
            loss_tokens_per_second, all_tokens_per_second; mfu (if the device's peak is known);
            peak_memory_bytes; sources (if there are several), which has loss and loss_tokens of
            each source with loss tokens in the step, by name.
        """
        line: dict[str, Any] = {"step": step}
        host = jax.device_get(values)
        sums, counts = host.pop("source_losses", ()), host.pop("source_tokens", ())
        line |= {name: float(value) for name, value in host.items()}
        now = time.perf_counter()
        seconds, self._step_end = now - self._step_end, now
        parts, self._parts = self._parts, {}
        line["seconds"] = seconds
        line |= {f"{part}_seconds": parts.get(part, 0.0) for part in PARTS}
        line["compute_seconds"] = max(0.0, seconds - sum(parts.values()))
        training = line["compute_seconds"] + line["data_seconds"]
        line["tokens_per_second"] = line["tokens"] / training
        line["loss_tokens_per_second"] = line["loss_tokens"] / training
        line["all_tokens_per_second"] = self._positions / training
        if self._peak is not None:
            flops = training_flops(self._model, int(line["tokens"]), pairs, lora=self._lora)
            line["mfu"] = flops / training / self._peak
        line["peak_memory_bytes"] = peak_memory(self._devices)
        flat = {f"train/{name}": value for name, value in line.items() if name != "step"}
        if len(sums):
            line["sources"] = {
                name: {"loss": float(total) / float(count), "loss_tokens": float(count)}
                for name, total, count in zip(self._sources, sums, counts, strict=True)
                if count
            }
            flat |= {f"train/loss/{name}": of["loss"] for name, of in line["sources"].items()}
        last = step == self._steps
        if step % self._every == 0 or last:
            self._records.write(line)
            for sink in self._sinks:
                sink.write(step, flat)
        shown = _describe(line)
        if not self._bar.disable:
            room = shutil.get_terminal_size().columns - BAR_COLUMNS
            while len(", ".join(shown)) > room and len(shown) > 1:
                shown.pop()
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update()
        if self._console_time is not None and (now - self._console_time >= CONSOLE_SECONDS or last):
            self._console_time = now
            text = f"step {step}/{self._steps}: {', '.join(shown)}"
            print(text, file=sys.stderr, flush=True)
        return line

    def close(self) -> None:
        """Close the progress bar and the sinks."""
        self._bar.close()
        for sink in self._sinks:
            sink.close()


def peak_memory(devices: list[jax.Device]) -> int:
    """Return the peak bytes in use: of the fullest GPU, or of this process without a GPU."""
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in devices]
    return max(peaks) or resident_peak()


def resident_peak() -> int:
    """Return the peak resident bytes of host memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _describe(line: dict[str, Any]) -> list[str]:
    """Return a step's values as text, the most important first."""
    parts = [f"loss {line['loss']:.3f}", f"{line['tokens_per_second']:,.0f} tokens/s"]
    if line.get("skipped"):
        parts.append(f"skipped {line['skipped']:.0f}")
    if "mfu" in line:
        parts.append(f"MFU {line['mfu']:.1%}")
    parts.append(f"lr {line['lr']:.2e}")
    parts.append(f"grad norm {line['grad_norm']:.2f}")
    parts.append(f"peak {line['peak_memory_bytes'] / 2**30:.1f} GiB")
    parts.append(f"waited {line['data_seconds']:.3f} s for data")
    return parts
