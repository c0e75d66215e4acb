"""What several measurements share: methods to compare, a text read in chunks, clocks, peaks, intervals, plots."""
