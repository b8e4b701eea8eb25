"""Training: from flags to a trained model.

main reads the flags (flags/) and tells the story of a run (run/): data (data/) go through a step
that is compiled once (step/), on the devices at hand (devices/), within their memory (memory/).
What happens is written down (evidence/), and kept in checkpoints (checkpoint/). The other commands:
preview shows the data before a run, report draws the curves after it, bench/ and data/bench
measure.
"""
