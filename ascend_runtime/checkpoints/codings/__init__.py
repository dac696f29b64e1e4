"""How weights in few bits are stored: their marks, scales and blocks."""
