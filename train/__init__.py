"""Training: from flags to a trained model.

main reads the flags (config/) and starts the run (run/): data (data/) go through a step that is
compiled once (step/), on the devices at hand (distributed/), within their memory (memory/). The run
writes metrics (metrics/) and checkpoints (checkpoint/). The other commands: preview shows the data
before a run, report plots the metrics after it, bench/ and data/bench measure.
"""
