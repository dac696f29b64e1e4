"""The host's devices and cores, and the environment variables of ranks."""
