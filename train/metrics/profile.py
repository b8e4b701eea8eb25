"""`--profile=START:STOP`: a trace of what the device does in a few steps."""

from pathlib import Path
from typing import Any

import jax


class Profile:
    """Begins and ends the trace around the window's steps."""

    def __init__(self, window: tuple[int, int] | None, directory: Path):
        """Nothing happens until the window is reached.

        Args:
            window: first and last step; None: never.
            directory: of the traces; TensorBoard's profile plugin reads it, and ui.perfetto.dev
                the trace.json.gz inside.
        """
        self._window, self._directory, self._open = window, directory, False

    def before(self, step: int, state: Any) -> None:
        """Begins before the window's first step, when all earlier work is done."""
        if self._window is not None and step == self._window[0]:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._directory))
            self._open = True

    def after(self, step: int, state: Any) -> bool:
        """Ends after the window's last step; whether it did."""
        if self._window is None or step != self._window[1]:
            return False
        jax.block_until_ready(state)
        return self.close()

    def close(self) -> bool:
        """Ends a trace that is open, as when a run stops inside the window."""
        if self._open:
            jax.profiler.stop_trace()
        was, self._open = self._open, False
        return was
