"""The wire protocols of trackagent, one package for each version."""
