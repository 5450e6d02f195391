"""A long steady load, and whether anything grows under it (`make soak`)."""
