"""Data that ships with qf: the built-in sample (rendered scenes, captions, questions) and the small CLIP made for it."""
