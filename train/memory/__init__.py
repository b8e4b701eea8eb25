"""What a run needs of a device's memory, before anything is compiled, and what to change."""
