"""What a node's validate_inputs answers."""

from collections.abc import Callable


def refusal(make: Callable[..., object], *values) -> bool | str:
    """True, or why `make(*values)` raises ValueError. None among the values stands for a link, which is known only when
    the graph runs."""
    try:
        if None not in values:
            make(*values)
    except ValueError as error:
        return str(error)
    return True
