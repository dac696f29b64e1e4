"""The command line: what each command does, its options, and what it says while it works."""
