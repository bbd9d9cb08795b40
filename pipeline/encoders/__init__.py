"""Frozen encoders: pixels to token features and, where there is a joint space, texts beside them."""
