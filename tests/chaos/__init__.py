"""Storms of faults over real ranks and agents, and the oracle that says what came of them."""
