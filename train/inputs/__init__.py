"""Read data sets, and make labels wrong."""
