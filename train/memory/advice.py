"""Suggest the cheapest flags that make a run fit its device.

Changes are ordered by cost: first those that only reorder work, then recomputation, then lower
precision, then transfers to the host. Where one change is not enough, the fewest changes are
combined, and among these the combination whose most expensive change is cheapest.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from jaxattn.device import GiB
from models.remat import REMAT, parse_remat
from train.config.config import Config
from train.memory.plan import Plan

Planner = Callable[[Config], Plan]
Change = tuple[str, Callable[[Config], Config]]  # a flag with its value, and its effect


def suggest_flags(
    needed: Planner,
    config: Config,
    *,
    fits: Callable[[Plan], bool],
    most_grad_accum: int,
    remat: str,
) -> str:
    """Return the flags to change, in words.

    Args:
        needed: Plans the memory of a run.
        config: Run that does not fit, with its remat.
        fits: Returns whether a plan fits device and host.
        most_grad_accum: Largest possible --grad_accum.
        remat: The fastest that fits, or needs the least.
    """
    least = needed(config).total
    for changes in _combinations(list(_changes(config, most_grad_accum, remat))):
        changed = config
        for _, change in changes:
            changed = change(changed)
        plan = needed(changed)
        if fits(plan):
            flags = " ".join(flag for flag, _ in changes)
            host = f" and {plan.host / GiB:.2f} GiB of the host" if plan.host else ""
            return f"take {flags}, which needs {plan.total / GiB:.2f} GiB{host}"
        least = min(least, plan.total)
    return (
        f"no flag makes it fit with this optimizer ({least / GiB:.2f} GiB at the least): take more "
        "devices (--mesh.fsdp; for long rows --mesh.seq), a shorter --seq_len, --optim.name="
        "adafactor or a smaller --model"
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


def _changes(config: Config, most_grad_accum: int, fastest: str) -> Iterator[Change]:
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
    order = [remat for remat in REMAT if "offload" not in remat]
    members = parse_remat(config.remat) if config.remat else ()
    if members and {*members} <= {*order}:
        most = min(map(order.index, members))
        for remat in order[most + (len({*members}) == 1) :]:
            yield setting(f"--remat={remat}", remat=remat)
    if config.optim.name == "adamw" and config.optim.moment_dtype != "int8":
        int8 = dataclasses.replace(config.optim, moment_dtype="int8")
        yield setting("--optim.moment_dtype=int8", optim=int8)
    if config.scan_layers is not False:  # which contradicts copies to the host
        for remat in dict.fromkeys((fastest, "offload", "offload_input")):
            if config.remat != remat and "offload" in remat:
                yield setting(f"--remat={remat}", remat=remat)
    if config.param_dtype != "bf16":
        yield setting("--param_dtype=bf16", param_dtype="bf16")
