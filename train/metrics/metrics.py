"""What a run says about itself: one JSON line per step, and a progress bar or console lines.

Step times are between the ends of steps, as seen from the host; the first step of a run carries
what was waited for until then. A line has what its part of the time went to: waiting for data, for
checkpoints, evaluations and samples, and the rest, which is computing.
"""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
from tqdm import tqdm

from jaxattn.device import peak_flops
from models.config import ModelConfig
from train.metrics.flops import training_flops
from train.metrics.records import Records

Part = Literal["data", "checkpoint", "evaluation"]
PARTS: tuple[Part, ...] = ("data", "checkpoint", "evaluation")
CONSOLE_SECONDS = 10
"""Least time between console lines."""


@runtime_checkable
class Sink(Protocol):
    """Takes numbers to where curves are drawn (`train.metrics.sinks`)."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step, by name."""

    def close(self) -> None:
        """The end."""


class Metrics:
    """Turns what a step returns into numbers for people, and writes them down."""

    def __init__(
        self,
        path: Path,
        *,
        model: ModelConfig,
        start: int,
        steps: int,
        log_every: int,
        positions: int,
        sinks: Sequence[Sink] = (),
    ):
        """Opens metrics.jsonl to append; lines after `start`, of a run that died, are dropped.

        Args:
            path: of metrics.jsonl.
            model: for its FLOPs.
            start: step the run goes on from.
            steps: of the whole run.
            log_every: steps between lines; the last step always has one.
            positions: of a step's rows, padding included.
            sinks: where the numbers of each line go too.

        Raises:
            OSError: if the file cannot be written.
        """
        self._model, self._steps, self._every = model, steps, log_every
        self._positions, self._sinks = positions, sinks
        self._devices = jax.local_devices()
        peak = peak_flops(self._devices[0])
        self._peak = None if peak is None else peak * jax.device_count()
        first = jax.process_index() == 0  # of several processes; the others only wait for values
        self._records = Records(path, start=start) if first else None
        if self._records is not None:
            self._records.write()  # makes the file: the directory is a run's from now on
        watched = sys.stderr.isatty() and first
        self._bar = tqdm(
            total=steps, initial=start, unit="step", dynamic_ncols=True, disable=not watched
        )
        self._said = None if watched or not first else 0.0  # when the last console line was
        self._then = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(self, part: Part, *, after: Any = None) -> Iterator[None]:
        """Counts the time inside as spent on `part` and not on computing.

        Args:
            part: on what.
            after: arrays that are waited for first, at the expense of computing.
        """
        jax.block_until_ready(after)
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._parts[part] = self._parts.get(part, 0.0) + time.perf_counter() - begun

    def record(self, step: int, values: dict[str, jax.Array], pairs: int) -> dict[str, Any]:
        """Waits for a step's values and shows them.

        Args:
            step: optimizer steps done, this one included.
            values: the step's metrics, float32 scalars on the device.
            pairs: causal query-key pairs inside its documents.

        Returns:
            The line: values; seconds, and of them data_seconds, checkpoint_seconds,
            evaluation_seconds, compute_seconds; tokens_per_second (not padding),
            loss_tokens_per_second, all_tokens_per_second; mfu (where the device's peak is known);
            peak_memory_bytes.
        """
        line: dict[str, Any] = {"step": step}
        line |= {name: float(value) for name, value in jax.device_get(values).items()}
        now = time.perf_counter()
        seconds, self._then = now - self._then, now
        parts, self._parts = self._parts, {}
        line["seconds"] = seconds
        line |= {f"{part}_seconds": parts.get(part, 0.0) for part in PARTS}
        line["compute_seconds"] = max(0.0, seconds - sum(parts.values()))
        line["tokens_per_second"] = line["tokens"] / seconds
        line["loss_tokens_per_second"] = line["loss_tokens"] / seconds
        line["all_tokens_per_second"] = self._positions / seconds
        if self._peak is not None:
            flops = training_flops(self._model, int(line["tokens"]), pairs)
            line["mfu"] = flops / seconds / self._peak
        line["peak_memory_bytes"] = peak_memory(self._devices)
        last = step == self._steps
        if step % self._every == 0 or last:
            if self._records is not None:
                self._records.write(line)
            for sink in self._sinks:
                sink.write(step, {f"train/{name}": line[name] for name in line if name != "step"})
        self._bar.set_postfix_str(_postfix(line), refresh=False)
        self._bar.update()
        if self._said is not None and (now - self._said >= CONSOLE_SECONDS or last):
            self._said = now
            print(f"step {step}/{self._steps}: {_postfix(line)}", file=sys.stderr, flush=True)
        return line

    def close(self) -> None:
        """Ends the bar and the sinks."""
        self._bar.close()
        for sink in self._sinks:
            sink.close()


def peak_memory(devices: list[jax.Device]) -> int:
    """Most bytes in use so far: of the fullest GPU, or of this process where there is none."""
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in devices]
    return max(peaks) or resident_peak()


def resident_peak() -> int:
    """Most bytes of host memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _postfix(line: dict[str, Any]) -> str:
    parts = [f"loss {line['loss']:.3f}"]
    parts.append(f"grad {line['grad_norm']:.2f}")
    parts.append(f"lr {line['lr']:.2e}")
    parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in line:
        parts.append(f"MFU {line['mfu']:.1%}")
    parts.append(f"waited {line['data_seconds']:.3f} s for data")
    parts.append(f"peak {line['peak_memory_bytes'] / 2**30:.1f} GiB")
    if line.get("skipped"):
        parts.append(f"skipped {line['skipped']:.0f}")
    return ", ".join(parts)
