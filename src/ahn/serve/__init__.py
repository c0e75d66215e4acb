"""`ahn serve`: many long conversations at once, each a fixed number of bytes."""
