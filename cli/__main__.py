"""`python -m llmc.cli` is the `llmc` command."""

from .main import main

if __name__ == "__main__":
    main()
