"""What is deployed: the chat model, the service, the batch program and Azure's scoring script.

Nothing here imports the course. `chat` travels with the model; the others travel with the files
that they share: `errors`, `request` and `served_model`.
"""
