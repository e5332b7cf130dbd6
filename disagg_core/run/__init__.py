"""One run: its plan, its directory, its attempts, and how its roles say what became of them."""
