"""Meshes, sharding rules and, over them, everything that knows of more than one device."""
