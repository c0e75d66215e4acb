"""What several measurements share: plots, clocks, intervals."""
