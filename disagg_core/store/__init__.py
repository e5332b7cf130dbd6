"""The data plane: samples as packed, hard-pinned objects in a Mooncake store."""
