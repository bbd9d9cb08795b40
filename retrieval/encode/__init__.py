"""Who embeds a query: the Q-Former, or the encoder's own models."""
