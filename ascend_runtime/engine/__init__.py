"""The rank's side: receives jobs, runs them, and replies."""
