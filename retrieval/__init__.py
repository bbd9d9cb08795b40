"""Weights and features to answers: index, search, evaluation. May import pipeline and trainer."""
