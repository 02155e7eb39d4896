"""The containers' own scripts, `backup/*.sh`, on a primary of this machine: what is archived comes back.

`make test-backup` makes .venv-backup for Barman; the compose suite does the same in the containers.
"""
