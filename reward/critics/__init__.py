"""The critics by name, and how one is made from a name and its settings."""
