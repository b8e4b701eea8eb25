"""`python -m train.bench`: the whole step's table, beside PyTorch's."""
