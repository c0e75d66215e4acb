"""A forward in parts: tokens that may be taken out again wait beside the window, and what they write does not stay.

With tokens waiting a layer holds [sinks | window and waiting], and tier and memory are as they were before the first of
these was read. A forward reads them again, as far as writing goes: its parts are forwards of their own over the same
columns, which begin where tier and memory stand. The last one reaches over the tokens that wait afterwards.
"""

import dataclasses
import itertools

from ahn.layout.visibility import Visibility


@dataclasses.dataclass(frozen=True)
class ForwardPart:
    """Part of a forward over tokens that waited and new ones.

    Attributes:
        view: of the part, as if its tokens had not been read before.
        queries: so many of the part's last tokens are new and have queries.
        stays: tier and memory keep what the part writes.
    """

    view: Visibility
    queries: int
    stays: bool


def split(view: Visibility, waiting: int, later: int) -> list[ForwardPart]:
    """The parts of a forward, in order; none where nothing waits.

    Args:
        waiting: tokens that wait before the forward.
        later: tokens that are to wait after it, all of them beyond sinks and window.
    """
    if not (waiting or later):
        return []
    first, settled = view.seen - waiting, view.total - later
    # New tokens in a part that stays have the forward's padding, those that waited have that of before.
    cuts = {first, settled, view.total} | ({view.seen} if settled > view.seen else set())
    return [_part(view, *span, span[1] <= settled) for span in itertools.pairwise(sorted(cuts))]


def _part(view: Visibility, start: int, stop: int, stays: bool) -> ForwardPart:
    own = dataclasses.replace(
        view,
        seen=start,
        length=stop - start,
        before=view.before if start <= view.seen else view.after,
        after=view.before if stop <= view.seen else view.after,
        in_columns=True,
    )
    return ForwardPart(own, max(0, stop - max(start, view.seen)), stays)
