"""Vectors to search, and what they stand for."""
