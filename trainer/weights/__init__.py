"""Weights in and out, under every name they have elsewhere."""
