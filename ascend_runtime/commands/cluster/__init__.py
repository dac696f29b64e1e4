"""The command `cluster`: makes and shows the files of clusters on this host."""
