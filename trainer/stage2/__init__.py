"""Stage 2: a frozen language model learns to see."""
