"""Compares every file of a kit with what was built: an address comes in, lines and an exit code go out."""

from helpers.models.kit import build_command, read_kit


def check(address: str) -> int:
    """Check a kit at a URL or in a folder, print a line for each problem and a summary; return 1 if there was any."""
    kit = read_kit(address)
    problems = list(kit.problems())
    for name in kit.unknown():
        print(f"unknown: {name} is no part of the kit, and is not served.")
    for problem in problems:
        print(f"FAIL  {problem}")
    if problems:
        again = "Tell whoever serves it" if kit.is_url else f"Build it again: {build_command(kit)}"
        print(f"{len(problems)} of {len(kit.files)} files are not as they were built. {again}")
    else:
        megabytes = sum(entry["size"] for entry in kit.files.values()) / 1e6
        print(f"{len(kit.files)} files, {megabytes:,.0f} MB: as they were built.")
    return int(bool(problems))
