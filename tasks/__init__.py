"""Prefect tasks: thin shells over `disagg_core`, one for each side effect of a run."""
