"""`python -m ascend_runtime explain FILE`: what made a video, and whether this host would make the same."""
