"""What can be found out before a GPU is held: preflight of a run, and the doctor for a machine."""
