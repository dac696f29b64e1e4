"""Number formats in blocks: some neighbours of a row share scales, and lie together in a fixed number of bytes."""
