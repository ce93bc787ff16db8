"""`python -m llava_fast`: the command line, as `llava-fast`."""

from llava_fast.cli import main

if __name__ == "__main__":
    main()
