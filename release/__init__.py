"""`make release`: a version is checked, built, described and tagged on this machine; a person pushes it."""
