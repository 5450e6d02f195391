"""`python -m trackagent.agent.cli` is the `trackagent` command."""

from trackagent.agent.cli import main

if __name__ == "__main__":
    main()
