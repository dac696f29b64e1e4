"""The machines of a cluster, as the client sees them: where they arrive, the link to each, and all of them as one group
of ranks."""
