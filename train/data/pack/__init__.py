"""Documents to rows of a batch."""
