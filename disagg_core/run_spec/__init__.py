"""The run document: one typed place for every tunable of a run."""
