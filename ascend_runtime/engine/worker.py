"""The main program of a rank: joins the others, then serves jobs until its control connection closes.

client/group.py starts it with torchrun's environment variables: RANK, LOCAL_RANK, WORLD_SIZE. torchrun itself starts it
with options (see machine/entering.py).
"""

import gc
import os
import sys

from ..hardware.processes import die_with

_PARENT = "ASCEND_RUNTIME_PARENT"
_DESCRIPTORS = ("ASCEND_RUNTIME_CONTROL_FD", "ASCEND_RUNTIME_STORE_FD")


def main() -> None:
    if sys.argv[1:] or _PARENT not in os.environ:
        from .machine.entering import enter

        enter(sys.argv[1:])
    die_with(int(os.environ[_PARENT]))
    gc.disable()  # imports create a million objects and no garbage, and the collector took a fifth of the start
    # Imported after die_with: a death of the parent during the imports would go unnoticed.
    import socket

    from ..wire.channel import Channel
    from .serve import serve

    gc.freeze()  # these objects are never garbage
    gc.enable()
    inherited = [int(os.environ[name]) for name in _DESCRIPTORS if name in os.environ]
    for descriptor in inherited:
        os.set_inheritable(descriptor, False)  # so the connection closes when this rank ends
    serve(Channel(socket.socket(fileno=inherited[0])))


if __name__ == "__main__":
    main()
