"""Number formats in blocks: some neighbours of a row share scales, lie together in a fixed number of bytes, or are
rotated."""
