"""`--profile=START:STOP`: a profiler trace of a few steps."""

from pathlib import Path
from typing import Any

import jax


class Profile:
    """Start and stop the profiler around the steps of a window."""

    def __init__(self, window: tuple[int, int] | None, directory: Path):
        """Store the first and the last step; None: no trace.

        TensorBoard's profile plugin reads the directory, ui.perfetto.dev the trace.json.gz inside.
        """
        self._window, self._directory, self._open = window, directory, False

    def before(self, step: int, state: Any) -> None:
        """Start the trace before the window's first step, after all earlier work is done."""
        if self._window is not None and step == self._window[0]:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._directory))
            self._open = True

    def after(self, step: int, state: Any) -> bool:
        """Stop the trace after the window's last step; return True if a trace was stopped."""
        if self._window is None or step != self._window[1]:
            return False
        jax.block_until_ready(state)
        return self.close()

    def close(self) -> bool:
        """Stop an open trace, for a run that ends inside the window; True if there was one."""
        if self._open:
            jax.profiler.stop_trace()
        was, self._open = self._open, False
        return was
