"""What surrounds our operators in the graph of a decoder layer, taken into them.

torch.compile hands over what a layer computes for one token. What we recognise in it becomes a part of an operator of
ours; the rest stays as it is, so a model that is written in another way loses a fusion and nothing else.
"""

from torch import fx

from ahn.decode.fusion.graph import in_place
from ahn.decode.fusion.products import fuse_products
from ahn.decode.fusion.rotation import fuse_rotation

__all__ = ["fuse"]


def fuse(graph: fx.Graph) -> None:
    """Rewrite a graph of torch functions, as Dynamo gives it to a backend, in place.

    A graph that changes tensors in place (other than by an operator of ours, on its own buffers) is left alone: there,
    what is computed of a tensor depends on when.
    """
    if any(in_place(node) for node in graph.nodes):
        return
    fuse_rotation(graph)
    fuse_products(graph)
    graph.eliminate_dead_code()
