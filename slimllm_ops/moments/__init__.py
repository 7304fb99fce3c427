"""Moments of activations: sum them over tokens, merge them over shards, unpack them for solves."""
