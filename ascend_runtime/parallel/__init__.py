"""How ranks share the work on one video: the mesh, CFG branches, and the sequence."""
