"""Make tables, tests and plots of many runs."""
