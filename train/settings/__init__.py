"""The keys of a run, and the names that they take."""
