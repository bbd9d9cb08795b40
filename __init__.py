"""qf: train a Q-Former (BLIP-2's Querying Transformer) on cached frozen CLIP features, and search pictures with it."""
