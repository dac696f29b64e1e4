"""A rank's side: it receives jobs, does them, and answers."""
