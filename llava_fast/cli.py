"""The command line."""


def main() -> None:
    raise SystemExit("llava-fast: error: no commands yet")
