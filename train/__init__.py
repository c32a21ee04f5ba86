"""Run the experiments: `python -m train` makes one training run, `python -m train.study` a set."""
