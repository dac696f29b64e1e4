"""What jobs compute, how long a host takes for it, and the profile that keeps what was measured."""
