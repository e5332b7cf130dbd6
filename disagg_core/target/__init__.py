"""The frozen target model: its facts, its parts, its tokenizer, and the one way to load it."""
