"""The caller's side: a group of ranks, and the jobs that it is given."""
