"""`python -m fisherlab`, and `torchrun -m fisherlab`."""

from fisherlab.cli import main

if __name__ == "__main__":
    main()
