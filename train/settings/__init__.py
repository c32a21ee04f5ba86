"""Define the keys of a run, and the names that they take."""
