"""A machine's relay: a small process that holds the machine's connection to the client, and passes messages between it
and the machine's ranks. It answers, and ends ranks, also while those wait for each other. Does not import torch."""
