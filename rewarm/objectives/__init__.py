"""What a method minimises, as parts: frozen objects with one contract."""
