"""A model of the pipeline: how fast each side of a run would be, what holds it up, and the best split of GPUs."""
