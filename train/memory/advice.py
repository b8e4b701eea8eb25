"""Suggest the cheapest flags that make a run fit its device.

Changes are ordered by cost: first those that only reorder work, then recomputation, then lower
precision, then transfers to the host. Where one change is not enough, the fewest changes are
combined, and among these the combination whose most expensive change is cheapest.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from jaxattn.device import GiB
from models.remat import REMAT
from train.config.config import Config
from train.memory.plan import Plan

Planner = Callable[[Config], Plan]
Change = tuple[str, Callable[[Config], Config]]  # a flag with its value, and its effect


def suggest_flags(needed: Planner, config: Config, memory: int, *, most_grad_accum: int) -> str:
    """Return the flags to change, in words.

    Args:
        needed: Plans the memory of a run.
        config: Run that needs more than `memory`, with its remat.
        memory: Bytes of the device.
        most_grad_accum: Largest possible --grad_accum.
    """
    least = needed(config).total
    for changes in _combinations(list(_changes(config, most_grad_accum))):
        changed = config
        for _, change in changes:
            changed = change(changed)
        total = needed(changed).total
        if total <= memory:
            flags = " ".join(flag for flag, _ in changes)
            return f"take {flags}, which needs {total / GiB:.2f} GiB"
        least = min(least, total)
    return (
        f"no flag makes it fit ({least / GiB:.2f} GiB at the least): take more devices "
        "(--mesh.fsdp; for long rows --mesh.seq), a shorter --seq_len or a smaller --model"
    )


def _combinations(single: list[Change]) -> list[list[Change]]:
    """Return all combinations of changes, one per flag, ordered by count, then by cost."""
    rank = {flag: cost for cost, (flag, _) in enumerate(single)}
    of_flag: dict[str, list[Change | None]] = {}
    for change in single:
        of_flag.setdefault(change[0].partition("=")[0], [None]).append(change)
    ways = [[c for c in way if c is not None] for way in itertools.product(*of_flag.values())]
    ways.sort(key=lambda way: (len(way), sorted((rank[flag] for flag, _ in way), reverse=True)))
    return ways[1:]  # without the empty combination


def _changes(config: Config, most_grad_accum: int) -> Iterator[Change]:
    """Yield single changes, the cheapest first."""

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
    if config.remat in order:
        for remat in order[order.index(config.remat) + 1 :]:
            yield setting(f"--remat={remat}", remat=remat)
    if config.optim.name == "adamw" and config.optim.moment_dtype != "int8":
        int8 = dataclasses.replace(config.optim, moment_dtype="int8")
        yield setting("--optim.moment_dtype=int8", optim=int8)
    if config.remat != "offload" and config.scan_layers is not False:  # which contradict
        yield setting("--remat=offload", remat="offload")
    if config.param_dtype != "bf16":
        yield setting("--param_dtype=bf16", param_dtype="bf16")
