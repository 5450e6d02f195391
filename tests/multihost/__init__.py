"""Several hosts on one machine, a job over them, faults, and the oracle of tests/chaos."""
