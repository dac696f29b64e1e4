"""`python -m ascend_runtime download NAME`: the files of a published model, from Hugging Face or ModelScope."""
