"""Stage 1: the Q-Former alone, with ITC, ITM and ITG."""
