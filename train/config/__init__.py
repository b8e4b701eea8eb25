"""The command line: what it takes, and what is wrong with it, in one line."""
