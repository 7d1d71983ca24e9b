"""What the operations page uses: programs that it starts, expectations, load, a dashboard."""
