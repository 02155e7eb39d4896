"""`python -m local.new clinic ../clinic`: a copy of the service for somebody who starts a project from it.

Nothing of it is a template: the copy is made of this tree's own files. `files` says which go along, `words` renames,
`changes` has the few places where a copy says something else, `library` puts pglifeguard into its `vendor/`.
"""
