"""The devices and processes of a run: how they are found, shared and watched."""
