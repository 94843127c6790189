"""Meshes, sharding rules and, on top of them, everything that involves more than one device."""
