"""`python -m ascend_runtime compare`: one video with and without accelerators, side by side."""
