"""Trackers: TensorBoard, Weights & Biases and MLflow are told what a run does, and can do nothing to it."""
