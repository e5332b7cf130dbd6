"""DSpark: the draft model with its Markov and confidence heads, its loss, and its drafter."""
