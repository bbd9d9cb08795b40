"""The stage that joins the three wings: records through an encoder to shards of features."""
