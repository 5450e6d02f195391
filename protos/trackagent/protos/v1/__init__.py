"""Version 1 of the wire protocols: the definitions and the code generated from them."""
