"""Cached features and captions to batches; a batch is a function of the step."""
