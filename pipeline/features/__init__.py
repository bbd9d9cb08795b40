"""Token features on disk: how they are encoded, the two shard formats, one reader for both."""
