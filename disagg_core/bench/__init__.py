"""How fast the parts of a run are on this machine, each beside a baseline in the same run: `draftline bench`."""
