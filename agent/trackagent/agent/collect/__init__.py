"""What an agent samples of its node: the contract of a collector, and the collectors."""
