"""A caption dataset, in any of the layouts people have, to records."""
