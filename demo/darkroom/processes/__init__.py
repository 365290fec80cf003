"""Work in processes of its own: children, environments, progress."""
