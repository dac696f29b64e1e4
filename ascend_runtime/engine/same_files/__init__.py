"""Whether all machines have the same files of a model, compared before anything of it is loaded; what differs, in
words."""
