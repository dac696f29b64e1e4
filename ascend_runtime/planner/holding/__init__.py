"""The bytes that weights, passes, caches, VAE tiles and pinned slabs take, each by one formula or dry run."""
