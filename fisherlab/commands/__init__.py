"""The commands of `fisherlab`, one file each: what a user types and what it answers."""
