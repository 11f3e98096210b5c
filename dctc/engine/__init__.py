"""The round engine: how updates run on any number of ranks. It knows parts and updates, and no method by name."""
