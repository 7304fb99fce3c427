"""Moments of activations: summed over tokens, merged over shards, unpacked for solves."""
