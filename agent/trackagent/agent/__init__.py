"""The daemon that runs once on each node."""
