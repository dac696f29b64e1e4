"""The host: its devices, its cores, and the environment of ranks."""
