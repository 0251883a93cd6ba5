"""What the import hook of conftest.py checks calls with."""

from beartype import BeartypeConf, beartype

# An int where a float is annotated is fine, as it is for Python's own type checkers (PEP 484's numeric tower).
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
