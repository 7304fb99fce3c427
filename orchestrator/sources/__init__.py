"""Fetches models and data from outside this machine: the Hugging Face hub and object stores."""
