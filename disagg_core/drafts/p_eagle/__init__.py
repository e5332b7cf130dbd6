"""P-EAGLE: EAGLE-3's inputs, all tokens of a proposal drafted in one pass."""
