"""Draft methods and what they share: vocabulary maps, the target's frozen parts, serving formats."""
