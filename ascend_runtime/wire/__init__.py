"""What the client and the ranks say to each other, and the way that it travels."""
