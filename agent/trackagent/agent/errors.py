"""Errors of the agent that reach the user: one line each, saying what to do next."""

from __future__ import annotations


class AgentError(Exception):
    """Base of every error that the agent's own code raises."""


class ConfigError(AgentError, ValueError):
    """A flag, an environment variable or a key in the configuration file is not usable."""
