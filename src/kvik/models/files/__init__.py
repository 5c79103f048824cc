"""How models lie on a disk: found, read, converted, kept."""
