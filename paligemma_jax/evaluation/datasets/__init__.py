"""Readers of public data sets: a folder and a split to examples, in the order of the files."""
