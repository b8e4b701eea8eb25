"""`python -m train.bench`: time whole training steps, beside PyTorch's."""
