"""Dataset to features: caption datasets in, cached frozen token features out. Knows nothing of training."""
