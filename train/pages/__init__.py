"""Tables, tests and plots of many runs."""
