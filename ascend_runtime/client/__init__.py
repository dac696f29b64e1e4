"""The caller's side: starts a group of ranks and submits jobs to it."""
