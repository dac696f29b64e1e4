"""`python -m ascend_runtime doctor`: finds what is wrong with this host before a job does. Imports no torch."""
