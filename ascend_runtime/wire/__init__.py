"""The messages between the client and the ranks, and their transport."""
