"""Messages without pickle, for peers that are not trusted."""
