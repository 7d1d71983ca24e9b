"""What is deployed. Each file here travels alone and imports nothing of the course."""
