"""The state of one conversation: what each layer keeps, its low-bit tier, and its file."""

from ahn.cache.conversation import AHNCache
from ahn.cache.progress import new_columns

__all__ = ["AHNCache", "new_columns"]
