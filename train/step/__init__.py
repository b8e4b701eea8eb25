"""One optimizer step: loss, gradients, guard, optimizer, state."""
