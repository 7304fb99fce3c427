"""Which units stay, and what recovers the output of the rest."""
