"""What a machine of a cluster runs besides its ranks proper: the first step of a rank that torchrun started, how it
joins the others, and the relay between all of them and the client."""
