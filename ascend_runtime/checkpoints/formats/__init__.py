"""The formats of files of tensors."""
