"""One rank: joins the others, then answers one job at a time until its control connection ends.

Started by client/group.py, under the names of torchrun's environment contract: RANK, LOCAL_RANK, WORLD_SIZE.
"""

import ctypes
import gc
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Has the kernel kill this rank when its starter dies, whatever this rank is doing then."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ["ASCEND_RUNTIME_PARENT"]):
        sys.exit("The process that started this rank is gone.")


def main() -> None:
    die_with_parent()
    gc.disable()  # importing makes a million objects and no garbage: looking for it took a fifth of the start
    # Imported only now: until here the death of the starter would go unnoticed.
    import socket

    from ..wire.channel import Channel
    from .serve import serve

    gc.freeze()  # nor will these objects ever be garbage
    gc.enable()
    control = int(os.environ["ASCEND_RUNTIME_CONTROL_FD"])
    store = int(os.environ["ASCEND_RUNTIME_STORE_FD"])
    for descriptor in (control, store):
        os.set_inheritable(descriptor, False)  # only this rank's death may end the connection
    channel = Channel(socket.socket(fileno=control))
    serve(channel)


if __name__ == "__main__":
    main()
