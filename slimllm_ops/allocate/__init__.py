"""How much every layer gives."""
