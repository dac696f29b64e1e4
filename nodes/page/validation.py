"""What a node's validate_inputs answers."""

from collections.abc import Callable

from ...ascend_runtime.errors import with_page


def refusal(make: Callable[..., object], *values, **named) -> bool | str:
    """True, or why `make(*values, **named)` raises ValueError.

    None among the values stands for a link, whose value is known only when the graph runs: the answer is then True.
    With values by name, or with several, it raises that ValueError. ComfyUI reports the text that validate_inputs
    returns once for each widget, but an error that it raises once for the node. A node with only one value has both in
    the same place.
    """
    if None in (*values, *named.values()):
        return True
    try:
        make(*values, **named)
    except ValueError as error:
        error.args = (with_page(str(error)),)
        if named or len(values) > 1:
            raise
        return str(error)
    return True
