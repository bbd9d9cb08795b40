"""Features to weights: the Q-Former, its objectives, its training. May import pipeline."""
