"""The classes of pruned models, a file for each family.

A copy of a family's file lies in every checkpoint that it writes. Its row in `families.py` imports it when asked for
the class.
"""
