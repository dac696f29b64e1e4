"""What jobs compute, and how long a host takes for it: work, measured jobs, fitted costs, the profile that keeps them."""
