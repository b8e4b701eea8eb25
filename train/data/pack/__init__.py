"""Documents to packed rows of a batch."""
