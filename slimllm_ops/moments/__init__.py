"""Sums moments of activations over tokens, merges them over shards, and unpacks them for solves."""
