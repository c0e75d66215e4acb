"""Where tokens lie and who sees them: positions, windows, fixed slots, padding, what leaves and when."""
