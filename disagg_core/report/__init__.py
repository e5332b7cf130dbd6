"""What is said of a run at its end: document, accounting, records, plots, archive."""
