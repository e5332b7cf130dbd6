"""EAGLE-3: the draft model and its training-time-test loss."""
