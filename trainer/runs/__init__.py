"""A run on disk: its folder, checkpoints, log and curves."""
