"""What the cloud page uses: a cluster's work simulated, and its exercises."""
