"""The prompts of a run: formats, files and datasets, order, chat templates, loss masks, and who has which."""
