"""The arrangements among which a choice is made, the sizes that fit, and the words for both."""
