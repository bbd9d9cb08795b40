"""Measures of a model. Each metric is a pure function on scores."""
