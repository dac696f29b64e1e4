"""The main program of a machine's relay. The machine's first rank starts it (engine/machine/entering.py)."""

from __future__ import annotations

import logging
import signal
import sys

import msgspec

from ....hardware.processes import die_with
from ....wire.tls import read_key
from .relay import Relay
from .settings import RelaySettings

logger = logging.getLogger(__name__)


def main() -> None:
    settings = msgspec.json.decode(sys.argv[1], type=RelaySettings)
    logging.basicConfig(level=logging.INFO, format=settings.machine.replace("%", "%%") + " | %(message)s")
    try:
        relay = Relay(settings, read_key(settings.key))
    except ValueError as error:
        sys.exit(f"{settings.machine} | {error}")  # its ranks notice that it has gone, and end too
    # By a signal that can be handled: what the first rank's death means to the client must still be sent.
    signal.signal(signal.SIGTERM, lambda *_: relay.end_soon())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(settings.parent, signal.SIGTERM)
    relay.run()


if __name__ == "__main__":
    main()
