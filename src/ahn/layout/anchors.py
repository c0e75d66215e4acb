"""When what is too far to be seen moves along behind the queries, in numbers; tensors: `ahn.layout.rotation`."""


def anchor_step(reach: int) -> int:
    """By how many tokens anchors move: the largest power of two within reach / 4."""
    return 1 << (reach // 4).bit_length() - 1


def anchor_at(position: int, reach: int) -> int:
    """Where a query at this position sees what is farther back than `reach`; `anchors` of one number."""
    step = anchor_step(reach)
    return 0 if position < reach else ((position - reach) // step + 1) * step


def anchor_moves(first: int, last: int, reach: int) -> list[int]:
    """The positions after `first`, up to `last`, whose query has another anchor than the one before."""
    step = anchor_step(reach)
    begin = reach if first < reach else first + step - (first - reach) % step
    return list(range(begin, last + 1, step))


def near_reach(reach: int, lossless: int) -> int:
    """From how far a query may see a token that a memory moves, if it may see a sink from `reach`, in tokens.

    A quarter of that, where a base finds more than at the edge of what it knows, but beyond sinks and window.
    """
    return max(reach // 4, lossless + 4)
