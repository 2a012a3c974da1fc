"""The operators behind the losses: their schemas, the libraries that serve them, the choice."""
