"""The graph of stages, cards, code digests, verification, and the readers that compare a card before opening a file."""
