"""The demonstration behind `ahn demo`: full attention, sinks + window, memories, two bits, measured on the same text.

`documents` makes the texts, `methods` the ways to read them, `reading` reads one, `comparison` puts it all together,
`figure` draws it. Nothing here prints.
"""

from ahn.demo.comparison import Comparison, compare
from ahn.demo.documents import Document, make_documents
from ahn.demo.methods import make_methods
from ahn.measure.method import Method

__all__ = ["Comparison", "Document", "Method", "compare", "make_documents", "make_methods"]
