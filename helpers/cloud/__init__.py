"""What the Cloud page uses: a simulation of a cluster."""
