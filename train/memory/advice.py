"""When a run does not fit its device: the cheapest change that makes it fit.

Changes have an order of cost: first what only reorders the work, then what computes something
twice, then what rounds more, then what waits for the host. What one of them cannot do alone, the
fewest do together, and of these the ones whose dearest is cheapest.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from models.remat import REMAT
from train.config.config import Config
from train.memory.plan import GiB, Plan

Planner = Callable[[Config], Plan]
Change = tuple[str, Callable[[Config], Config]]  # a flag with its value, and what that changes


def suggest_flags(needed: Planner, config: Config, have: int, *, most_grad_accum: int) -> str:
    """What to change.

    Args:
        needed: plans a run.
        config: a run that needs more than there is.
        have: bytes of the device.
        most_grad_accum: parts that a step's rows can be worked through in.
    """
    least = needed(config).total
    for changes in _together(list(_changes(config, most_grad_accum))):
        changed = config
        for _, change in changes:
            changed = change(changed)
        total = needed(changed).total
        if total <= have:
            flags = " ".join(flag for flag, _ in changes)
            return f"take {flags}, which needs {total / GiB:.2f} GiB"
        least = min(least, total)
    return (
        f"no flag makes it fit ({least / GiB:.2f} GiB at the least): take more devices "
        "(--mesh.fsdp), a shorter --seq_len or a smaller --model"
    )


def _together(single: list[Change]) -> list[list[Change]]:
    """All ways to make changes, with one value for a flag: the fewest first, then the cheapest."""
    rank = {flag: cost for cost, (flag, _) in enumerate(single)}
    of_flag: dict[str, list[Change | None]] = {}
    for change in single:
        of_flag.setdefault(change[0].partition("=")[0], [None]).append(change)
    ways = [[c for c in way if c is not None] for way in itertools.product(*of_flag.values())]
    ways.sort(key=lambda way: (len(way), sorted((rank[flag] for flag, _ in way), reverse=True)))
    return ways[1:]  # but for none at all


def _changes(config: Config, most_grad_accum: int) -> Iterator[Change]:
    """The cheapest first."""

    def setting(flag: str, **fields) -> Change:
        return flag, lambda c: dataclasses.replace(c, **fields)

    if config.attn == "eager":
        yield setting("--attn=xla", attn="xla")
    grad_accum = config.grad_accum * 2
    while grad_accum <= most_grad_accum:
        if most_grad_accum % grad_accum == 0:
            yield setting(f"--grad_accum={grad_accum}", grad_accum=grad_accum)
        grad_accum *= 2
    order = [remat for remat in REMAT if remat != "offload"]
    if config.remat is not None and config.remat in order:
        for remat in order[order.index(config.remat) + 1 :]:
            yield setting(f"--remat={remat}", remat=remat)
    if config.optim.name == "adamw" and config.optim.moment_dtype != "int8":
        int8 = dataclasses.replace(config.optim, moment_dtype="int8")
        yield setting("--optim.moment_dtype=int8", optim=int8)
    if config.remat != "offload" and config.scan_layers is not False:  # which contradict
        yield setting("--remat=offload", remat="offload")
    if config.param_dtype != "bf16":
        yield setting("--param_dtype=bf16", param_dtype="bf16")
