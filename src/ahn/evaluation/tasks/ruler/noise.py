"""What RULER hides things in where it needs no text."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
