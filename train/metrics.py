"""What a run says about itself: one JSON line per step, and a progress bar.

Step times are between the ends of steps, as seen from the host; the first step of a run, and the
one during which a checkpoint was begun, carry what was waited for.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from models.config import ModelConfig
from train.flops import peak_flops, training_flops


class Metrics:
    """Turns what a step returns into numbers for people, and writes them down."""

    def __init__(self, path: Path, *, model: ModelConfig, start: int, steps: int, log_every: int):
        """Opens metrics.jsonl to append; lines after `start`, of a run that died, are dropped.

        Args:
            path: of metrics.jsonl.
            model: for its FLOPs.
            start: step the run goes on from.
            steps: of the whole run.
            log_every: steps between lines; the last step always has one.

        Raises:
            OSError: if the file cannot be written.
        """
        self._model, self._steps, self._every = model, steps, log_every
        self._devices = jax.local_devices()
        peak = peak_flops(self._devices[0])
        self._peak = None if peak is None else peak * jax.device_count()
        first = jax.process_index() == 0  # of several processes; the others only wait for values
        if first:
            kept = [line for line in _lines(path) if json.loads(line)["step"] <= start]
            path.write_text("".join(kept))
        self._file = path.open("a") if first else open(os.devnull, "w")  # noqa: SIM115
        self._bar = tqdm(
            total=steps,
            initial=start,
            disable=not first,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 10,  # a log file wants fewer lines
        )
        self._then = time.perf_counter()

    def record(self, step: int, values: dict[str, jax.Array], pairs: int) -> dict[str, Any]:
        """Waits for a step's values and shows them.

        Args:
            step: optimizer steps done, this one included.
            values: the step's metrics, float32 scalars on the device.
            pairs: causal query-key pairs inside its documents.

        Returns:
            The line: values, seconds, tokens_per_second (not padding), mfu (where the device's peak
            is known), peak_memory_bytes.
        """
        line: dict[str, Any] = {"step": step}
        line |= {name: float(value) for name, value in jax.device_get(values).items()}
        now = time.perf_counter()
        seconds, self._then = now - self._then, now
        line["seconds"] = seconds
        line["tokens_per_second"] = line["tokens"] / seconds
        if self._peak is not None:
            flops = training_flops(self._model, int(line["tokens"]), pairs)
            line["mfu"] = flops / seconds / self._peak
        line["peak_memory_bytes"] = peak_memory(self._devices)
        if step % self._every == 0 or step == self._steps:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self._bar.set_postfix_str(_postfix(line), refresh=False)
        self._bar.update()
        return line

    def close(self) -> None:
        """Ends the bar and the file."""
        self._bar.close()
        self._file.close()


def peak_memory(devices: list[jax.Device]) -> int:
    """Most bytes in use so far: of the fullest GPU, or of this process where there is none."""
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in devices]
    if max(peaks) > 0:
        return max(peaks)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _postfix(line: dict[str, Any]) -> str:
    parts = [f"loss {line['loss']:.3f}", f"{line['tokens_per_second']:,.0f} tokens/s"]
    if "mfu" in line:
        parts.append(f"MFU {line['mfu']:.1%}")
    parts.append(f"peak {line['peak_memory_bytes'] / 2**30:.1f} GiB")
    return ", ".join(parts)


def _lines(path: Path) -> list[str]:
    """Complete lines of an earlier run; one that was cut off by a kill is not complete."""
    text = path.read_text() if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
