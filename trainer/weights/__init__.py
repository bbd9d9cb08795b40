"""Weights in and out, under our key names and those of other code. No file here knows the model."""
