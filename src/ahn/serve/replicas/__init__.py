"""Several engines behind one port, with Ray Serve."""
