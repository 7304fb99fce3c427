"""Methods side by side: one model, the same data, the same number of parameters."""
