"""The one exception type that every expected failure of this package raises."""


class AHNError(ValueError):
    """Something the caller can fix: a wrong path, shape, window or model. The message says what to do."""
