"""Files of every kind to training examples and tokens."""
