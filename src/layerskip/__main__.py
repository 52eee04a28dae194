"""`python -m layerskip`: the command line, where the script is not on the path."""

from layerskip.cli import main

if __name__ == "__main__":
    main()
