"""Train InternLM2 with the public functions: resolve a run, read data, step, save the weights.

    python examples/train_in_60_lines.py FILE... --steps 20 --out my-model

`python -m train.main` adds to this: checkpoints, resume, validation, metrics, signals.
"""

import argparse

from flax import nnx

from models import InternLM2, save_hf
from train.config.config import Config
from train.config.sections import DataConfig
from train.run.build import abstract_training, compile_training, initial_params, open_training
from train.run.resolve import resolve
from train.run.summary import describe_run
from train.step.state import new_state
from train.step.step import put_batch


def train(config: Config) -> tuple[InternLM2, list[float]]:
    """Train for `config.steps` steps; return the model and the losses."""
    run = resolve(config)  # model, mesh, attention, dtypes, remat, memory plan
    run.check_memory()
    print(*describe_run(run), sep="\n")
    losses = []
    with open_training(run) as loader:  # packed rows with segment ids, an endless iterator
        print(loader.report)
        run = run.with_epochs(loader.report.rows)
        tx, graphdef, like = abstract_training(run)  # optax optimizer; shapes and shardings
        state = new_state(initial_params(run, like), tx, like)
        step = compile_training(run, tx, graphdef, state, len(loader.sources))
        for number in range(1, run.steps + 1):
            batch = put_batch(next(loader), grad_accum=config.grad_accum, mesh=run.real_mesh)
            state, metrics = step(state, batch)  # the memory of the old state is reused
            losses.append(float(metrics["loss"]))
            print(f"step {number}/{run.steps}: loss {losses[-1]:.3f}")
    return nnx.merge(graphdef, state.weights), losses


def main() -> None:
    """Read the command line, train a small model, and save it as Hugging Face files."""
    parser = argparse.ArgumentParser(description="Train a small InternLM2.")
    parser.add_argument("files", nargs="*", help="data; without any, the built-in text")
    parser.add_argument("--model", default="nano", help="preset, or directory of HF weights")
    parser.add_argument("--seq_len", type=int, default=256, help="tokens per packed row")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--out", help="directory to create for the weights")
    args = parser.parse_args()
    data = DataConfig(files=tuple(args.files) or None)
    model, _ = train(Config(model=args.model, data=data, seq_len=args.seq_len, steps=args.steps))
    if args.out:
        save_hf(model, args.out)


if __name__ == "__main__":
    main()
