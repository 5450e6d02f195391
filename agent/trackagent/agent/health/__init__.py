"""What goes wrong in a run or on its node, told while it does: pure rules, and the thread that asks them."""
