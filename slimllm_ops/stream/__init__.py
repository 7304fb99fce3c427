"""Hidden states on their way through a model, a layer at a time."""
