"""What a node's validate_inputs answers."""

from collections.abc import Callable


def refusal(make: Callable[..., object], *values) -> bool | str:
    """True, or why `make(*values)` raises ValueError. None among the values stands for a link, which is known only when
    the graph runs.

    Several values: raises that ValueError. What validate_inputs returns, ComfyUI reports once for each widget that it
    names; what it raises, once for the node. A node with no output of its own has both in the same place.
    """
    if None in values:
        return True
    try:
        make(*values)
    except ValueError as error:
        if len(values) > 1:
            raise
        return str(error)
    return True
