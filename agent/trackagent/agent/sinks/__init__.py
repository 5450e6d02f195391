"""Where deliveries go: the contract, and what adapts each store to it."""
