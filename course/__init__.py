"""What operates the course, behind ``python -m helpers COMMAND``: set-up, pages, kit, doctor, benchmarks."""
