"""`python -m trackagent.agent.cli` is the `trackagent` command."""

from trackagent.agent.cli import entry

if __name__ == "__main__":
    entry()
