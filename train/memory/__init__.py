"""Plan the memory of a run before anything is compiled, and suggest flags that make it fit."""
