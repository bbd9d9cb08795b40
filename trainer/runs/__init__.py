"""A run on disk: its folder, checkpoints, log and curves; and the panel that shows it."""
