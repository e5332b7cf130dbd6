"""Recurring training: what a night trains on, what it continues, and whether there is anything to do at all."""
