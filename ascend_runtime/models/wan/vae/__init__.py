"""The Wan VAEs."""
