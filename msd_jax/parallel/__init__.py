"""Meshes, sharding rules, processes, and the few shapes that batches are padded to."""
