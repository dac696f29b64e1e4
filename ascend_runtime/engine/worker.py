"""The main program of a rank: joins the others, then serves jobs until its control connection closes.

client/group.py starts it with torchrun's environment variables: RANK, LOCAL_RANK, WORLD_SIZE.
"""

import ctypes
import gc
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Makes the kernel kill this rank when the process that started it dies."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ["ASCEND_RUNTIME_PARENT"]):
        sys.exit("The process that started this rank is gone.")


def main() -> None:
    die_with_parent()
    gc.disable()  # imports create a million objects and no garbage, and the collector took a fifth of the start
    # Imported after die_with_parent: a death of the parent during the imports would go unnoticed.
    import socket

    from ..wire.channel import Channel
    from .serve import serve

    gc.freeze()  # these objects are never garbage
    gc.enable()
    control = int(os.environ["ASCEND_RUNTIME_CONTROL_FD"])
    store = int(os.environ["ASCEND_RUNTIME_STORE_FD"])
    for descriptor in (control, store):
        os.set_inheritable(descriptor, False)  # so the connection closes when this rank ends
    channel = Channel(socket.socket(fileno=control))
    serve(channel)


if __name__ == "__main__":
    main()
