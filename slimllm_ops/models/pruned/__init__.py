"""Holds the classes of pruned models, with a file for each family.

Every pruned checkpoint contains a copy of its family's file. The family's row in `families.py` imports the file when
the class is needed.
"""
