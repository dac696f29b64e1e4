"""Parallelism over ranks: the mesh, CFG branches, sequence and tensor parallelism, FSDP, and VAE tiles."""
