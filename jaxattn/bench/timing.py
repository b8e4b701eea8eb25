"""How the bench and the tuner take a time, whoever does the work."""

import statistics
import time
from collections.abc import Callable


def milliseconds(
    run: Callable[[], object],
    wait: Callable[[object], object],
    *,
    seconds: float = 0.5,
    repeats: int = 5,
) -> float:
    """Median over `repeats` of the mean time of back-to-back launches that fill `seconds`.

    What takes longer than that is launched once in each of 3 repeats.

    Args:
      run: launches the work, without waiting for it.
      wait: waits for what `run` returned.
      seconds: time to spend.
      repeats: of which the median is taken.
    """
    for _ in range(2):  # compile, fill caches; the second time is an estimate
        begin = time.perf_counter()
        wait(run())
    took = time.perf_counter() - begin
    repeats = repeats if took < seconds else 3
    launches = max(1, round(seconds / repeats / took))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(launches):
            out = run()
        wait(out)
        times.append((time.perf_counter() - begin) / launches * 1e3)
    return statistics.median(times)
