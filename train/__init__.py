"""The experiment driver: `python -m train` runs one training, `python -m train.study` a set."""
