"""What checks the types in the second run of `make test`: beartype, where an int will do for a float (PEP 484)."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
