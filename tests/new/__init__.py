"""A project made by `make new`, installed, served and checked as its owner would (`make test-new`)."""
