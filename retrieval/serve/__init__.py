"""Search in a browser and over HTTP."""
