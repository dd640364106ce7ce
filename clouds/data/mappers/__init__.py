"""One record -> one sample; a file for each kind of record."""
