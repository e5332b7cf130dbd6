"""The three role processes: producer, consumer, evaluation; each is one `python -m`."""
