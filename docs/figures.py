"""Draw the plots of the documentation from the result files in results (`make figures`).

`tables` writes the tables from the same files.

Every plot names the device, the library versions and the date of its file in its title.
"""

import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of the backend)
import numpy as np  # noqa: E402
import tables  # noqa: E402  (beside this file)

HERE = pathlib.Path(__file__).parent
RESULTS, FIGURES = HERE.parent / "results", HERE / "figures"
COLORS = {  # color-blind safe (Okabe and Ito)
    "pallas": "#0072B2",
    "torch-fa4": "#009E73",
    "cudnn": "#E69F00",
    "torch-sdpa": "#CC79A7",
    "xla": "#D55E00",
    "eager": "#56B4E9",
    "fa3": "#000000",
}
LABELS = {
    "fa3": "FlashAttention-3",
    "torch-fa4": "FlashAttention-4",
    "torch-sdpa": "PyTorch SDPA",
    "cudnn": "cuDNN",
}


def main() -> None:
    """Draw all plots into docs/figures."""
    FIGURES.mkdir(exist_ok=True)
    step_time()
    attention_rate()
    loss_curves()


def step_time() -> None:
    """Plot the time of a training step against the sequence length, one line per implementation."""
    cells = tables.cells_of(tables.EVIDENCE / "seed" / "bench.json")
    cells = [cell for cell in cells if "ms" in cell]
    origin = cells[0]
    lengths = sorted({cell["seq_len"] for cell in cells})
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in ("eager", "xla", "cudnn", "pallas"):
        own = sorted((c["seq_len"], c["ms"]) for c in cells if c["attn"] == name)
        if not own:  # not measured yet
            continue
        x = [lengths.index(length) for length, _ in own]
        ms = [value for _, value in own]
        axes.plot(x, ms, marker="o", color=COLORS[name], label=LABELS.get(name, name))
        axes.annotate(
            f"{ms[-1]:,.0f} ms",
            (x[-1], ms[-1]),
            xytext=(8, {"cudnn": 4, "pallas": -10}.get(name, -3)),  # these two lines coincide
            textcoords="offset points",
            color=COLORS[name],
        )
    axes.set_xticks(range(len(lengths)), [f"{n:,} x {32_768 // n}" for n in lengths])
    axes.set(xlabel="tokens per row x rows (32,768 tokens a step)", ylabel="ms per training step")
    axes.set_ylim(0)
    axes.set_xlim(-0.15, len(lengths) - 0.6)
    axes.set_title(
        f"InternLM2-1.8B, full training step, bf16, one document per row\n"
        f"{origin['device']}, {origin['versions']}, {origin['date']}, commit {origin['commit']}",
        fontsize=10,
    )
    _finish(figure, axes, "step_time")


def attention_rate() -> None:
    """Plot the useful rate of attention alone, forward + backward, a group of bars per shape."""
    cells = tables.cells_of(tables.EVIDENCE / "kernels.json")
    cells = [cell for cell in cells if "both_tflops" in cell]
    shapes = list(dict.fromkeys(cell["shape"] for cell in cells))
    rate = {(cell["shape"], cell["impl"]): cell["both_tflops"] for cell in cells}
    names = ("pallas", "torch-fa4", "fa3", "cudnn", "torch-sdpa")
    names = [name for name in names if any(impl == name for _, impl in rate)]
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for row, shape in enumerate(shapes):
        ran = [name for name in names if (shape, name) in rate]
        for place, name in enumerate(ran):  # centered on the tick, without gaps
            x = row + (place - (len(ran) - 1) / 2) * 0.8 / len(names)
            axes.bar(x, rate[shape, name], 0.76 / len(names), color=COLORS[name])
    for name in names:
        axes.bar(0, 0, color=COLORS[name], label=LABELS.get(name, name))
    axes.set_xticks(range(len(shapes)), [s.replace("_", "\n") for s in shapes], fontsize=8)
    axes.set_ylabel("useful TFLOP/s, forward + backward")
    axes.set_ylim(0, 1.3 * max(rate[shape, name] for shape, name in rate if name in names))
    versions = {v for cell in cells for v in cell["versions"].split(", ")}
    axes.set_title(
        f"Attention alone, bf16, head dim 128. {cells[0]['device']}, "
        f"{', '.join(sorted(versions))}, {cells[0]['date']}, commit {cells[0]['commit']}",
        fontsize=9,
    )
    _finish(figure, axes, "attention_rate", columns=len(names))


def loss_curves() -> None:
    """Plot the loss over steps: storage of weights and moments, fp8 products, and adapters."""
    scratch = "InternLM2-1.8B from random weights, {} of 4,096 tokens a step"
    _curves(
        "loss_curves",
        {
            "fp32 weights and moments": "curve_fp32",
            "int8 moments": "curve_int8",
            "bf16 weights": "curve_bf16_weights",
        },
        title=scratch.format("2 rows"),
        date="2026-11-22 and 23",
    )
    runs = {"bf16 products": "loss_bf16", "fp8 products": "loss_fp8"}
    _curves("fp8_loss", runs, title=scratch.format("1 row"), date="2026-11-30")
    _curves(
        "lora_loss",
        {"full fine-tuning": "chat_full", "LoRA": "chat_lora", "QLoRA": "chat_qlora"},
        title="InternLM2-1.8B after 500 steps on text, then chats, 2 rows of 2,048 tokens a step",
        date="2026-11-30",
    )


def _curves(name: str, runs: dict[str, str], *, title: str, date: str) -> None:
    """Plot the losses of runs, by their label, of files in results/train/h200."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    window = 20
    for label, color in zip(runs, ("#000000", "#0072B2", "#D55E00"), strict=False):
        file = RESULTS / "train" / "h200" / f"{runs[label]}.jsonl"
        losses = [json.loads(line)["loss"] for line in file.open()]
        mean = np.convolve(losses, np.full(window, 1 / window), "valid")
        axes.plot(range(window, len(losses) + 1), mean, color=color, label=label, linewidth=1)
    axes.set(xlabel="step", ylabel=f"loss, mean of {window} steps")
    axes.set_title(f"{title}\n1 x NVIDIA H200, jax 0.11.2, {date}", fontsize=10)
    _finish(figure, axes, name)


def _finish(figure, axes, name: str, *, columns: int = 1) -> None:
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=columns)
    figure.savefig(FIGURES / f"{name}.png", dpi=120, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
