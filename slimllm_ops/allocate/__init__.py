"""Allocates a budget: decides how much is removed from every layer."""
