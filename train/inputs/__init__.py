"""Data sets and wrong labels."""
