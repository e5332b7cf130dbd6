"""The consumer's side: loader, trainer, optimizer, checkpoints."""
