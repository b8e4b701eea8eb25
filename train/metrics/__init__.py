"""Metrics of a run: step records, validation, samples, skipped steps, profiles, plots."""
