"""What the Operations page uses: programs that it starts, evaluation of prompts, load."""
