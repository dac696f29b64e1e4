"""`python -m ascend_runtime plan MODEL`: what each plan of a job takes, which fit, and which is chosen."""
