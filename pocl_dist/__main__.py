"""`python -m pocl_dist X` is `pocl-dist X`."""

from pocl_dist.cli import main

if __name__ == "__main__":
    main()
