"""The commands that a user types, and what they share."""
