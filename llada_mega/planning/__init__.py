"""Before a run: what this machine has."""
