"""What a run says of itself: metrics, validation, samples, skipped steps, traces, curves."""
