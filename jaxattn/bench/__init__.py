"""`python -m jaxattn.bench`: time, rate, memory and error of every implementation, side by side."""
