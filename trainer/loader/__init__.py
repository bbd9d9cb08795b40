"""Cached features and captions to batches. A batch is a function of its number."""
